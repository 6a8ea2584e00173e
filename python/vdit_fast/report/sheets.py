"""Contact sheets: many clips on one page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .clips import to_uint8
from .style import SOFT, render
from .video import upscale

MAX_CLIPS = 64


def contact_sheet(
    clips: Mapping[str, Any], path: str | Path, *, frames: int = 5, scale: int = 1, title: str | None = None
) -> Path:
    """One row per clip: its caption (the prompt), then ``frames`` frames evenly spread over it.

    ``clips``: {caption: [T, C, H, W]}, C 1 or 3; ``scale`` repeats pixels of small clips. Writes ``path`` and its .json
    (captions and shapes, no pixels); returns the picture's path. Raises ValueError for no or too many clips.
    """
    if not 1 <= len(clips) <= MAX_CLIPS:
        raise ValueError(f"clips has {len(clips)} entries; pass 1 to {MAX_CLIPS}")
    if not 1 <= frames <= 16:
        raise ValueError(f"frames is {frames}; pass 1 to 16")
    rows: list[tuple[str, Any, list[int]]] = []
    for caption, clip in clips.items():
        pictures = to_uint8(clip, f"clips[{caption!r}]").cpu()
        if pictures.shape[1] not in (1, 3):
            raise ValueError(f"clips[{caption!r}] has {pictures.shape[1]} channels; pass 1 (grey) or 3 (RGB)")
        length = pictures.shape[0]
        shown = min(frames, length)
        picks = [round(i * (length - 1) / max(shown - 1, 1)) for i in range(shown)]
        rows.append((caption, upscale(pictures[picks], scale).permute(0, 2, 3, 1).numpy(), picks))
    tallest = max(p.shape[1] / p.shape[2] for _, p, _ in rows)
    cell, caption_width = 1.7, 2.5
    size = (caption_width + cell * frames, (0.5 if title else 0.1) + len(rows) * max(cell * tallest + 0.28, 0.8))

    def draw(figure: Any) -> None:
        ratios = [caption_width / cell] + [1.0] * frames
        grid = figure.subplots(len(rows), frames + 1, squeeze=False, width_ratios=ratios)
        for axes in grid.flat:
            axes.axis("off")
        for line, (caption, pictures, picks) in zip(grid, rows, strict=True):
            wrapped = "\n".join(textwrap.wrap(caption, 26, max_lines=5, placeholder=" …"))
            line[0].text(0.0, 0.5, wrapped, ha="left", va="center", fontsize=10, transform=line[0].transAxes)
            for axes, picture, number in zip(line[1:], pictures, picks, strict=False):
                axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axes.text(
                    0.5,
                    -0.04,
                    f"frame {number}",
                    ha="center",
                    va="top",
                    transform=axes.transAxes,
                    fontsize=8,
                    color=SOFT,
                )
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)

    shapes = [{"caption": caption, "shape": list(clips[caption].shape), "frames": picks} for caption, _, picks in rows]
    return render("contact_sheet", path, {"clips": shapes, "title": title}, draw, size, replot=False)
