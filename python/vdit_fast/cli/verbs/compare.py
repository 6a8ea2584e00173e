"""``vdit-fast compare``: how far is one video from another?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vdit_fast.cli.output import DebugFlag, JsonFlag, session

Clip = Annotated[Path, typer.Argument(help="Video file.", show_default=False)]
Reference = Annotated[Path, typer.Argument(help="Video file that counts as the truth.", show_default=False)]
Plot = Annotated[Path | None, typer.Option(help="Also draw the PSNR of each frame to this PNG.")]
MaxFrames = Annotated[int | None, typer.Option(help="Read at most so many frames of each.", min=1)]


def command(
    clip: Clip,
    reference: Reference,
    plot: Plot = None,
    max_frames: MaxFrames = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Compare two videos: PSNR, SSIM, flicker. An mp4 adds its own loss: compare lossless .mkv files."""
    with session(as_json, debug) as out:
        from vdit_fast import report

        result = report.compare_clips(
            report.read_video(clip, max_frames=max_frames), report.read_video(reference, max_frames=max_frames)
        )
        numbers = result.to_dict()
        if plot is not None:
            report.per_frame_psnr({clip.name: numbers["psnr_per_frame"]}, plot, title=f"PSNR against {reference.name}")
        out.emit({"kind": "vdit_fast.compare", "clip": clip.name, "reference": reference.name, **numbers})
        out.show(metrics_table(numbers, f"{clip.name} against {reference.name}"))


def metrics_table(numbers: dict[str, Any], title: str | None = None) -> Table:
    """The metrics of ``ClipComparison.to_dict()`` as a table."""
    table = Table("metric", "value", "meaning", title=title, title_justify="left")
    rows = (
        ("psnr", "PSNR", "dB, mean of the frames; identical is inf, above 40 hardly visible"),
        ("psnr_pooled", "PSNR, pooled", "dB of all pixels together"),
        ("ssim", "SSIM", "1 is identical structure"),
        ("flicker_psnr", "flicker PSNR", "dB of the frame differences: low means flicker of its own"),
        ("relative_l2", "relative L2", "length of the difference / length of the reference"),
        ("cosine", "cosine", "1 is the same direction"),
    )
    for key, name, meaning in rows:
        value = numbers.get(key)
        table.add_row(name, "-" if value is None else f"{float(value):.4g}", meaning)
    return table
