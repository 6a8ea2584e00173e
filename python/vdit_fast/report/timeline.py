"""Where the time of each denoising step went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import INK, colour, render
from .tables import format_seconds

# fixed colours, so that two timelines compare
KNOWN = {"dense": 0, "sparse": 1, "cached": 2, "mixed": 3, "search": 4, "forecast": 5}


def step_timeline(steps: Sequence[Mapping[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """One bar per denoising step, coloured by how it ran, with the time spent on planning on top.

    ``steps``: dicts with ``mode`` ("dense", "sparse", "search", "forecast", "mixed", "cached" or another word),
    ``seconds`` (whole step) and optionally ``plan_seconds`` (part of it that built plans) and ``dense_seconds`` (the
    same step of the model it is compared with, drawn as a mark). Writes ``path`` and its .json; returns the picture's
    path. Raises ValueError for an empty list, missing keys, or times that are negative or larger than their step.
    """
    rows: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        missing = [key for key in ("mode", "seconds") if step.get(key) is None]
        if missing:
            raise ValueError(f"steps[{index}] lacks {missing[0]!r}; pass mode and seconds")
        seconds, plan = float(step["seconds"]), float(step.get("plan_seconds") or 0.0)
        if not (0 <= plan <= seconds < math.inf):
            raise ValueError(
                f"steps[{index}] has {seconds} s with {plan} s of planning; pass 0 <= plan_seconds <= seconds"
            )
        row: dict[str, Any] = {"mode": str(step["mode"]), "seconds": seconds, "plan_seconds": plan}
        if step.get("dense_seconds") is not None:
            row["dense_seconds"] = float(step["dense_seconds"])
        rows.append(row)
    if not rows:
        raise ValueError("steps is empty; pass at least one step")
    total, planning = sum(r["seconds"] for r in rows), sum(r["plan_seconds"] for r in rows)
    heading = (
        title or f"Time per step: {format_seconds(total)} in total, {100 * planning / (total or 1):.1f} % planning"
    )

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        modes = list(dict.fromkeys(r["mode"] for r in rows))
        spare = len(KNOWN)
        peak = max(max(r["seconds"], r.get("dense_seconds", 0.0)) for r in rows) or 1.0
        unit, scale = ("s", 1.0) if peak >= 1 else ("ms", 1e3) if peak >= 1e-3 else ("µs", 1e6)
        for mode in modes:
            number = KNOWN.get(mode)
            if number is None:
                number, spare = spare, spare + 1
            at = [i for i, r in enumerate(rows) if r["mode"] == mode]
            work = [(rows[i]["seconds"] - rows[i]["plan_seconds"]) * scale for i in at]
            axes.bar(at, work, width=0.82, color=colour(number), label=f"{mode} ({len(at)} step{'s' * (len(at) != 1)})")
        if planning > 0:
            at = [i for i, r in enumerate(rows) if r["plan_seconds"] > 0]
            base = [(rows[i]["seconds"] - rows[i]["plan_seconds"]) * scale for i in at]
            share = [rows[i]["plan_seconds"] * scale for i in at]
            axes.bar(at, share, 0.82, bottom=base, color="#2b2b2b", hatch="////", edgecolor="white", label="planning")
        marks = [(i, r["dense_seconds"] * scale) for i, r in enumerate(rows) if "dense_seconds" in r]
        if marks:
            where, height = zip(*marks, strict=True)
            low, high = [i - 0.41 for i in where], [i + 0.41 for i in where]
            axes.hlines(height, low, high, color="white", linewidth=4, zorder=3)  # visible on every colour
            axes.hlines(height, low, high, color=INK, linewidth=1.6, zorder=4, label="dense model")
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(14, integer=True))
        axes.set_xlim(-0.7, len(rows) - 0.3)
        axes.set_ylim(0, 1.08 * peak * scale)
        axes.set_xlabel("denoising step")
        axes.set_ylabel(f"time ({unit})")
        axes.set_title(heading)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return render("step_timeline", path, {"steps": rows, "title": title}, draw, (8.6, 3.6))
