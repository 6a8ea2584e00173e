"""``vdit-fast bench methods``: all sparse methods on the demo model at one density."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vdit_fast.cli.given import refuse
from vdit_fast.cli.output import DebugFlag, JsonFlag, session

QUICK_STEPS = 4

_PROMPT = "One or two objects, each 'colour shape direction'; may be repeated, quality is then the mean."
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help=_PROMPT)]
Only = Annotated[list[str] | None, typer.Option("--method", help="Only this planner, e.g. svg1; may be repeated.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Repeats = Annotated[int, typer.Option(help="Timed rounds; each runs everything once, in turns.", min=1)]
Density = Annotated[float, typer.Option(help="Share of the pairs that sparse calls read.")]
DenseSteps = Annotated[int | None, typer.Option(help="First steps kept dense; default a quarter.", min=0)]
DenseLayers = Annotated[int, typer.Option(help="First layers kept dense.", min=0)]
Minutes = Annotated[float, typer.Option(help="Begin no further round that would end later.", min=0)]
Quick = Annotated[bool, typer.Option("--quick", help="At most 4 steps, one round, a coarse search: does it run?")]
OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for methods.json, methods.md and the pictures.")]
Size = Annotated[int | None, typer.Option(hidden=True, min=1)]


def command(
    context: typer.Context,
    prompt: Prompts = None,
    method: Only = None,
    steps: Steps = 12,
    repeats: Repeats = 3,
    density: Density = 0.3,
    dense_steps: DenseSteps = None,
    dense_layers: DenseLayers = 0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    minutes: Minutes = 60,
    quick: Quick = False,
    out_dir: OutDir = Path("vdit_fast_methods"),
    frames: Size = None,
    size: Size = None,
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare all sparse methods at one density: quality, speed, planning; table, JSON and pictures."""
    with session(as_json, debug) as out:
        from vdit_fast import report
        from vdit_fast.cli import methods_report
        from vdit_fast.cli.methods_bench import PROMPTS, Settings, run_methods

        if quick:
            for name, value, most in (("steps", steps, QUICK_STEPS), ("repeats", repeats, 1)):
                if value > most:
                    refuse(context, name, why=f"--quick runs at most {most}; leave one of them out")
            steps, repeats = min(steps, QUICK_STEPS), 1
        options: dict[str, Any] = {"frames": frames, "height": size, "width": size}
        settings = Settings(
            prompts=tuple(prompt or PROMPTS),
            steps=steps,
            repeats=repeats,
            seed=seed,
            density=density,
            dense_steps=max(1, steps // 4) if dense_steps is None else dense_steps,
            dense_layers=dense_layers,
            minutes=minutes,
            probes=6 if quick else 9,
            **{name: value for name, value in options.items() if value is not None},
        )
        with out.progress() as advance:
            document, contestants = run_methods(settings, names=method, weights=weights, progress=advance)
        document["verdict"] = methods_report.verdict(document)
        out_dir.mkdir(parents=True, exist_ok=True)
        files = methods_report.draw(document, out_dir)
        grid = document["settings"]["token_grid"]
        files += methods_report.draw_plans(contestants, grid, document["settings"]["layers"] // 2, out_dir)
        rows = methods_report.cells(document)
        text = report.table(rows, methods_report.HEADERS, style="markdown")
        (out_dir / "methods.md").write_text(
            f"{text}\n\n{methods_report.LEGEND}.\n\n{document['verdict']}\n", encoding="utf-8"
        )
        document["files"] = [file.name for file in files] + ["methods.md", "methods.json"]
        report.write_json(out_dir / "methods.json", document)
        out.emit(report.json_safe(document))
        out.show(*_tables(rows, document), f"[dim]{methods_report.LEGEND}[/]\n")
        for name, reason in document["left_out"].items():
            out.show(f"[yellow]left out: {escape(name)}: {escape(reason)}[/]")
        out.show(*(f"[yellow]note: {escape(note)}[/]\n" for note in document["notes"]))
        out.show(f"[bold]{escape(document['verdict'])}[/]")
        out.show(f"written to {escape(str(out_dir))}: {', '.join(document['files'])}")


def _tables(rows: list[list[str]], document: dict[str, Any]) -> list[Table]:
    """Quality and speed, each narrow enough for a terminal."""
    from vdit_fast.cli.methods_report import HEADERS, SPEED

    s = document["settings"]
    work = f"{s['tokens']:,} tokens, {s['steps']} steps ({s['dense_steps']} dense), {document['rounds']} rounds"
    tables = []
    for what, columns in (("quality", range(SPEED)), ("speed", (0, *range(SPEED, len(HEADERS))))):
        table = Table(title=f"sparse methods, {what}: {work}", title_justify="left")
        for column in columns:
            words = HEADERS[column] in ("method", "setting")
            table.add_column(HEADERS[column], justify="left" if words else "right", no_wrap=words)
        for row in rows:
            table.add_row(*(escape(row[column]) for column in columns))
        tables.append(table)
    return tables
