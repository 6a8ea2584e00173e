"""``vdit-fast bench``: the attention kernel against torch SDPA on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vdit_fast.cli.bench import DENSITIES, SUITES, Shape, draw, run_bench
from vdit_fast.cli.devices import DTYPES, resolve_device, resolve_dtype
from vdit_fast.cli.given import refuse
from vdit_fast.cli.output import DebugFlag, JsonFlag, session
from vdit_fast.cli.verbs import bench_combinations, bench_methods

Suite = Annotated[str, typer.Option(help=f"Shapes to run: {', '.join(SUITES)}.")]
_DENSITIES = ",".join(f"{d:g}" for d in DENSITIES)
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="BATCHxHEADSxLENGTHxDIM instead of a suite; may be repeated.")
]
Densities = Annotated[str, typer.Option(help="Shares of the key blocks to read, comma-separated.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}; default fp32 on a CPU, bf16 on a GPU.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Block = Annotated[int, typer.Option(help="Side of the square blocks that a plan keeps or drops.", min=1)]
Repeats = Annotated[int, typer.Option(help="Timed rounds; the median counts.", min=1)]


app = typer.Typer(invoke_without_command=True)
app.command("methods")(bench_methods.command)
app.command("combinations")(bench_combinations.command)


@app.callback()
def command(
    context: typer.Context,
    suite: Suite = "quick",
    shape: Shapes = None,
    densities: Densities = _DENSITIES,
    dtype: Dtype = "auto",
    device: Device = "auto",
    block: Block = 64,
    repeats: Repeats = 5,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for bench.json and the picture.")] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Time dense and block-sparse attention, interleaved with torch SDPA; medians of several rounds.

    The commands `methods` and `combinations` compare sparse methods and whole configurations on the demo model instead.
    """
    if context.invoked_subcommand is not None:
        with session(as_json, debug):
            refuse(context, why=f"write it behind the command: bench {context.invoked_subcommand} --help lists its own")
        return
    with session(as_json, debug) as out:
        from vdit_fast import report

        if shape:
            refuse(context, "suite", why="--shape says what is run; leave one of them out")

        place = resolve_device(device)
        kind = resolve_dtype(dtype, place)
        if not shape and suite not in SUITES:
            raise ValueError(f"suite: {suite!r} is unknown; known: {', '.join(SUITES)}")
        shapes = [Shape.parse(s) for s in shape] if shape else list(SUITES[suite])
        options: dict[str, Any] = {"dtype": kind, "device": place, "block": block, "repeats": repeats, "seed": seed}
        with out.progress() as advance:
            document = run_bench(shapes, densities=_numbers(densities), progress=advance, **options)
        document["environment"] = report.environment()
        if out_dir is not None:
            report.write_json(out_dir / "bench.json", document)
            draw(document, out_dir)
        out.emit(report.json_safe(document))
        for result in document["results"]:
            out.show(_table(result, document["settings"]))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"densities: {text!r} is not a list of numbers; write for example 1,0.5,0.25") from None


def _table(result: dict[str, Any], settings: dict[str, Any]) -> Table:
    from vdit_fast.report import format_percent, format_ratio, format_seconds

    shape, dtype, device = result["shape"]["label"], settings["dtype"], settings["device"]
    title = f"attention {shape} (batch x heads x length x dim), {dtype}, {device}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "density", "median", "min-max", "dense GFLOP/s", "executed GFLOP/s", "vs torch SDPA"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            format_percent(row["density"]),
            format_seconds(row["seconds"]),
            f"{format_seconds(row['min'])}-{format_seconds(row['max'])}",
            f"{row['effective_gflops']:.1f}",
            f"{row['executed_gflops']:.1f}",
            format_ratio(row["speedup"], row["speedup_min"], row["speedup_max"]),
            style="" if row["own"] else "dim",
        )
    return table
