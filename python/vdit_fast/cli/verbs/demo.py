"""``vdit-fast demo``: the whole library on a tiny trained model, no download, no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vdit_fast.cli.configuration import ConfigOption, SetOption, label, resolve
from vdit_fast.cli.output import DebugFlag, JsonFlag, session

_PROMPT_HELP = "One or two objects, each 'colour shape direction', e.g. 'green triangle left'."
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Repeats = Annotated[int, typer.Option(help="Timed runs of each side, in turns.", min=1)]
OutDir = Annotated[Path, typer.Option("--out", "-o", help="Folder for clips, pictures and results.json.")]
Size = Annotated[int | None, typer.Option(hidden=True, min=1)]


def command(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help=_PROMPT_HELP)] = "red circle right, blue square up",
    config: ConfigOption = "balanced",
    overrides: SetOption = None,
    steps: Steps = 12,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    repeats: Repeats = 2,
    out_dir: OutDir = Path("vdit_fast_demo"),
    frames: Size = None,
    size: Size = None,
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Draw a clip with stock diffusers and accelerated; compare time and pixels; write clips and pictures."""
    with session(as_json, debug) as out:
        from vdit_fast.demo.run import run_demo

        options: dict[str, Any] = {"frames": frames, "height": size, "width": size, "weights": weights}
        options = {name: value for name, value in options.items() if value is not None}
        found = resolve(config, overrides)
        with out.progress() as advance:
            results = run_demo(
                prompt,
                found,
                label=label(config, overrides),
                steps=steps,
                seed=seed,
                repeats=repeats,
                out=out_dir,
                progress=advance,
                **options,
            )
        out.emit(results)
        out.show(results_table(results), *(f"[yellow]note: {escape(note)}[/]\n" for note in results["notes"]))
        out.show(f"written to {escape(str(out_dir))}: {', '.join(results['files'])}")


def results_table(results: dict[str, Any]) -> Table:
    """The demo's numbers as a table."""
    from vdit_fast.report import format_count, format_percent, format_ratio, format_seconds

    s, speed, density, quality = (results[key] for key in ("settings", "speed", "density", "quality"))
    table = Table(title=f"{results['prompt']} · {results['label']}", title_justify="left", show_header=False)
    dense, fast, ratio = speed["dense_seconds"], speed["fast_seconds"], speed["speedup"]
    spread = " ({} to {} of {} runs)"

    def seconds(row: dict[str, Any]) -> str:
        text = format_seconds(row["median"])
        many = len(row["all"]) > 1
        low, high = format_seconds(row["min"]), format_seconds(row["max"])
        return text + (spread.format(low, high, len(row["all"])) if many else "")

    tokens = f"{format_count(s['tokens'])} tokens, {s['layers']} layers, {s['heads']} heads, {s['steps']} steps"
    table.add_row("work", f"{tokens}, guidance {s['guidance']:g}, {s['threads']} CPU threads")
    table.add_row("stock diffusers (torch SDPA)", seconds(dense))
    table.add_row(f"accelerate(…, {results['label']!r})", seconds(fast))
    bounds = (ratio["min"], ratio["max"]) if len(ratio["all"]) > 1 else (None, None)
    table.add_row("speed-up", f"[bold]{format_ratio(ratio['median'], *bounds)}[/]")
    sparse = sum(any(0 < d < 1 for d in layers) for layers in zip(*density["layer_step"], strict=True))
    forecast = sum(step["mode"] == "forecast" for step in results["steps"])
    if forecast:
        table.add_row("steps forecast", f"{forecast} of {s['steps']}")
    table.add_row("attention density, all steps", format_percent(density["overall"]))
    table.add_row(f"attention density, {sparse} sparse steps", format_percent(density["sparse_steps"]))
    table.add_row("PSNR against the dense clip", f"{float(quality['psnr']):.1f} dB")
    if quality.get("ssim") is not None:
        table.add_row("SSIM", f"{float(quality['ssim']):.4f}")
    if quality.get("flicker_psnr") is not None:
        table.add_row("flicker PSNR", f"{float(quality['flicker_psnr']):.1f} dB")
    table.add_row("latent relative L2, last step", f"{results['latent_relative_l2'][-1]:.4f}")
    return table
