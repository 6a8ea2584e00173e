"""``vdit-fast generate``: draw a video with a local diffusers pipeline, accelerated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vdit_fast.cli.configuration import ConfigOption, SetOption, label, resolve
from vdit_fast.cli.devices import resolve_device
from vdit_fast.cli.given import refuse
from vdit_fast.cli.output import DebugFlag, JsonFlag, session

_MODEL = "Local folder of a diffusers pipeline (with model_index.json)."
Model = Annotated[Path, typer.Option("--model", "-m", help=_MODEL, show_default=False)]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What to draw.", show_default=False)]
Negative = Annotated[str | None, typer.Option(help="What to avoid.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default: the pipeline's own.", min=1)]
Pixels = Annotated[int | None, typer.Option(help="Pixels; default: the pipeline's own.", min=1)]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip; default: the pipeline's own.", min=1)]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; default: the pipeline's own.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="Video file: .mp4, or .mkv for lossless.")]
Fps = Annotated[float, typer.Option(help="Frames per second of the file.", min=1)]
Dtype = Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16.")]
Baseline = Annotated[bool, typer.Option("--baseline", help="Draw it with the stock model too, and compare.")]


def command(
    context: typer.Context,
    model: Model,
    prompt: Prompt,
    config: ConfigOption = "balanced",
    overrides: SetOption = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    negative_prompt: Negative = None,
    guidance: Guidance = None,
    out_file: OutFile = Path("vdit_fast.mp4"),
    fps: Fps = 16,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    baseline: Baseline = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Draw a video with any local diffusers text-to-video pipeline and say what ran where. Nothing is downloaded."""
    with session(as_json, debug) as out:
        from vdit_fast import report
        from vdit_fast.cli.generation import Request, draw, load_pipeline, takes_seed

        if out_file.suffix.lower() not in (".mp4", ".mkv", ".mov"):
            raise ValueError(f"out: {out_file.name!r} is no video file; use .mp4, .mov or .mkv")
        found = resolve(config, overrides)
        place = resolve_device(device)
        pipe = load_pipeline(model, dtype, place)
        if not takes_seed(pipe):
            refuse(context, "seed", why=f"{type(pipe).__name__} takes no generator of its noise")
        request = Request(prompt, negative_prompt, steps, seed, height, width, frames, guidance)
        with out.progress() as advance:
            stock = draw(pipe, request, None, advance) if baseline else None
            drawn = draw(pipe, request, found, advance)
        file = report.write_video(out_file, drawn.clip, fps=fps)
        document: dict[str, Any] = {
            "kind": "vdit_fast.generate",
            "file": str(file),
            "pipeline": type(pipe).__name__,
            "config": found.to_dict(),
            "device": place,
            "settings": drawn.settings,
            "clip": list(drawn.clip.shape),
            "seconds": drawn.seconds,
            "report": {"text": drawn.report} | drawn.stats,
            "environment": report.environment(),
        }
        if stock is not None:
            comparison = report.compare_clips(drawn.clip, stock.clip).to_dict()
            document |= {"stock_seconds": stock.seconds, "quality": comparison}
        out.emit(report.json_safe(document))
        out.show(escape(drawn.report))
        if stock is not None:
            from vdit_fast.cli.verbs.compare import metrics_table

            ratio = report.format_ratio(stock.seconds / drawn.seconds)
            out.show(f"stock {report.format_seconds(stock.seconds)}, {ratio} (first runs, nothing warmed up)")
            out.show(metrics_table(comparison, f"{label(config, overrides)} against the stock model"))
        t, _, h, w = drawn.clip.shape
        seconds = report.format_seconds(drawn.seconds)
        out.show(f"{escape(str(file))}: {t} frames of {w} x {h}, {seconds} with {label(config, overrides)}")
