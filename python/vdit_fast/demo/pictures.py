"""The demo's clips and pictures; everything but the clips and the plan can be redrawn from ``results.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vdit_fast import report

if TYPE_CHECKING:
    from vdit_fast.plan import AttentionPlan

FPS, SCALE, SHEET_FRAMES = 12, 4, 6
CLIPS = ("dense.mkv", "fast.mkv")  # lossless: what `vdit-fast compare` and the contact sheet read


def write_clips(dense: torch.Tensor, fast: torch.Tensor, results: dict[str, Any], folder: Path) -> list[Path]:
    """Write both clips, lossless and side by side as a film, and a contact sheet."""
    files = [report.write_video(folder / name, clip, fps=FPS) for name, clip in zip(CLIPS, (dense, fast), strict=True)]
    film = report.side_by_side([dense, fast], list(_labels(results)), scale=SCALE)
    files.append(report.write_mp4(folder / "side_by_side.mp4", film, fps=FPS))
    return [*files, draw_sheet(dense, fast, results, folder)]


def draw_sheet(dense: torch.Tensor, fast: torch.Tensor, results: dict[str, Any], folder: Path) -> Path:
    """Draw frames of both clips, one row each."""
    rows = dict(zip(_labels(results), (dense, fast), strict=True))
    path = folder / "contact_sheet.png"
    frames = min(SHEET_FRAMES, dense.size(0))
    return report.contact_sheet(rows, path, frames=frames, scale=2, title=results["prompt"])


def redraw(results: dict[str, Any], source: Path, folder: Path) -> list[Path]:
    """Draw everything again from a results document and the files beside it, those that are still there."""
    files = draw(results, folder)
    if (source / "plan.json").is_file():
        files.append(report.replot(source / "plan.json", folder / "plan.png"))
    clips = [source / name for name in CLIPS]
    if all(clip.is_file() for clip in clips):
        dense, fast = (report.read_video(clip) for clip in clips)
        files.append(draw_sheet(dense, fast, results, folder))
    return files


def _labels(results: dict[str, Any]) -> tuple[str, str]:
    dense, fast = (results["speed"][f"{side}_seconds"]["median"] for side in ("dense", "fast"))
    return f"torch SDPA {dense:.1f} s", f"{results['label']} {fast:.1f} s"


def draw_plan(
    plans: Sequence[tuple[int, AttentionPlan]], grid: tuple[int, int, int], results: dict[str, Any], folder: Path
) -> list[Path]:
    """Draw the plan of the middle sparse step; nothing if every call was dense."""
    if not plans:
        return []
    step, plan = plans[len(plans) // 2]
    layer = results["settings"]["layers"] // 2
    title = f"keys read at step {step}, layer {layer}, head 0"
    return [report.plan_heatmap(plan, folder / "plan.png", grid=grid, title=title)]


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw density, quality and time from a results document."""
    label, density = results["label"], results["density"]
    return [
        report.density_heatmap(
            density["layer_head"], folder / "density.png", title=f"{label}: share of the keys read, sparse steps"
        ),
        report.density_heatmap(
            density["layer_step"], folder / "density_steps.png", columns="step", title=f"{label}: keys read"
        ),
        report.per_frame_psnr(
            {label: results["per_frame_psnr"]}, folder / "psnr.png", title="PSNR of each frame against the dense clip"
        ),
        report.step_timeline(results["steps"], folder / "steps.png", title=f"{label}: seconds per denoising step"),
    ]
