"""Every picture of this package, and replot(), which draws one again from the JSON saved next to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .curves import pareto, per_frame_psnr, recall_curve, speed_curve
from .heatmaps import density_heatmap, draw_plan_heatmap, plan_heatmap
from .jsonio import read_json
from .sheets import contact_sheet
from .timeline import step_timeline

__all__ = [
    "contact_sheet",
    "density_heatmap",
    "pareto",
    "per_frame_psnr",
    "plan_heatmap",
    "recall_curve",
    "replot",
    "speed_curve",
    "step_timeline",
]

_FROM_JSON: dict[str, Callable[[dict[str, Any], Path], Path]] = {
    "plan_heatmap": draw_plan_heatmap,
    "density_heatmap": lambda data, path: density_heatmap(path=path, **data),
    "recall_curve": lambda data, path: recall_curve(path=path, **data),
    "pareto": lambda data, path: pareto(path=path, **data),
    "step_timeline": lambda data, path: step_timeline(path=path, **data),
    "per_frame_psnr": lambda data, path: per_frame_psnr(path=path, **data),
    "speed_curve": lambda data, path: speed_curve(path=path, **data),
}


def replot(json_path: str | Path, out: str | Path | None = None) -> Path:
    """Draws a saved plot again, from its JSON alone, to ``out`` (default: the .png next to it). Returns the path.

    Raises FileNotFoundError, or ValueError for a JSON that is no plot of this package or a contact sheet (no pixels).
    """
    source = Path(json_path)
    saved = read_json(source)
    kind = saved.get("plot") if isinstance(saved, dict) else None
    if kind == "contact_sheet":
        raise ValueError(f"{source.name} lists a contact sheet's clips, not their pixels; draw it from the clips again")
    if kind not in _FROM_JSON or not isinstance(saved.get("data"), dict):
        raise ValueError(f"{source.name} is not a plot's JSON; pass one of: {', '.join(_FROM_JSON)}")
    try:
        return _FROM_JSON[kind](saved["data"], source.with_suffix(".png") if out is None else Path(out))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source.name} is a damaged {kind} JSON ({error}); write it again") from error
