"""Pictures of where attention is spent: one plan, or the density of every layer, head and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .raster import plan_raster
from .style import HEAT, INK, PLAN_HEAT, SOFT, render


def _frame_lines(
    length: int, grid: Sequence[int] | None, text: int, text_first: bool
) -> tuple[list[int], tuple[int, int] | None]:
    """Token positions where frames begin and end, and the text tokens' (start, stop), in the model's own order."""
    if grid is None:
        return [], None
    frames, area = int(grid[0]), int(grid[1]) * int(grid[2])
    if len(grid) != 3 or frames * area + text != length:
        raise ValueError(
            f"grid {tuple(grid)} and text {text} make {frames * area + text} tokens, the plan has {length};"
            " pass the plan's own grid and text length"
        )
    first = text if text_first else 0
    span = ((0, text) if text_first else (frames * area, length)) if text else None
    return [first + i * area for i in range(frames + 1)], span


def _token_ticks(axis: Any, length: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    short = length >= 10_000
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if short and x else f"{x:,.0f}"))


def _draw_plan(figure: Any, data: dict[str, Any]) -> None:
    panels, lq, lk = data["panels"], data["lq"], data["lk"]
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    mesh = None
    for axes_i, panel in zip(axes, panels, strict=True):
        image = np.asarray(panel["permille"]) / 1000
        mesh = axes_i.imshow(
            image, extent=(0, lk, lq, 0), vmin=0, vmax=1, cmap=PLAN_HEAT, aspect="auto", interpolation="nearest"
        )
        axes_i.grid(False)
        if panel["order"] == "original" and data["frames"]:
            wide = len(data["frames"]) <= 40
            for at in data["frames"]:
                axes_i.axhline(at, color="white", linewidth=0.6 if wide else 0.3, alpha=0.55)
                axes_i.axvline(at, color="white", linewidth=0.6 if wide else 0.3, alpha=0.55)
            if data["text"]:
                middle = sum(data["text"]) / 2
                axes_i.annotate(
                    "text", (middle, 0), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9, color=SOFT
                )
        axes_i.set_xlim(0, lk)
        axes_i.set_ylim(lq, 0)
        axes_i.set_title(panel["title"], fontsize=11, fontweight="normal", pad=18 if data["text"] else 10)
        axes_i.set_xlabel("key token")
        _token_ticks(axes_i.xaxis, lk)
        _token_ticks(axes_i.yaxis, lq)
    axes[0].set_ylabel("query token")
    bar = figure.colorbar(mesh, ax=list(axes), shrink=0.9, pad=0.02, aspect=28)
    bar.set_label("fraction of pairs read")
    bar.outline.set_visible(False)
    figure.suptitle(data["title"], x=0.01, ha="left", fontweight="bold", fontsize=13)


def plan_heatmap(
    plan: Any,
    path: str | Path,
    *,
    head: int = 0,
    batch: int = 0,
    grid: Sequence[int] | None = None,
    text: int = 0,
    text_first: bool = False,
    max_pixels: int = 512,
    title: str | None = None,
) -> Path:
    """One head of an AttentionPlan as a picture of which query reads which key.

    A plan with ``q_order`` or ``kv_order`` gets two panels: the model's own token order, and the permuted order that
    the kernel works in. ``grid`` (frames, height, width in tokens) with ``text`` tokens (``text_first``: before the
    video) draws frame borders. Writes ``path`` (.png by default) and its .json; returns the picture's path.
    Raises ValueError for a head, batch or grid that is not the plan's.
    """
    if grid is not None and plan.lq != plan.lk:
        raise ValueError(
            f"grid needs self-attention, but the plan has {plan.lq} queries and {plan.lk} keys; leave it out"
        )
    frames, span = _frame_lines(plan.lq, grid, text, text_first)
    permuted = plan.q_order is not None or plan.kv_order is not None
    panels: list[dict[str, Any]] = []
    density = 0.0
    for order in ("original", "permuted") if permuted else ("original",):
        image = plan_raster(plan, head=head, batch=batch, max_pixels=max_pixels, original_order=order == "original")
        name = "token order of the model" if order == "original" else "permuted order, as computed"
        panels.append({"order": order, "title": name, "permille": (image * 1000).round().int().tolist()})
        density = float(image.mean())
    if title is None:
        title = f"Attention plan, head {head}: {100 * density:.1f} % of {plan.lq:,} × {plan.lk:,} pairs read"
    data = {"title": title, "lq": plan.lq, "lk": plan.lk, "frames": frames, "text": span, "panels": panels}
    return draw_plan_heatmap(data, path)


def draw_plan_heatmap(data: dict[str, Any], path: str | Path) -> Path:
    """Draws the data of a plan_heatmap JSON."""
    size = (1.9 + 4.35 * len(data["panels"]), 5.7)  # makes the panels square: a fixed aspect breaks the layout engine
    return render("plan_heatmap", path, data, lambda figure: _draw_plan(figure, data), size)


def _matrix(density: Any) -> np.ndarray:
    """2-D float array; None and NaN mark cells without a value. Raises ValueError otherwise."""
    rows = density.tolist() if hasattr(density, "tolist") else density
    try:
        values = np.array([[math.nan if v is None else float(v) for v in row] for row in rows], dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError("density is not a table of numbers; pass density[row][column], rows of one length") from error
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"density has shape {values.shape}; pass a non-empty table density[row][column]")
    known = values[~np.isnan(values)]
    if known.size == 0 or known.min() < -1e-6 or known.max() > 1 + 1e-6:
        raise ValueError("density holds no number, or one outside [0, 1]; pass fractions of the pairs that are read")
    return values


def density_heatmap(
    density: Any,
    path: str | Path,
    *,
    columns: str = "head",
    rows: str = "layer",
    title: str | None = None,
    label: str = "density",
) -> Path:
    """Achieved density as a layer × head or layer × step map: ``density[row][column]`` in [0, 1], None where unknown.

    ``columns`` and ``rows`` name the axes, ``label`` the colours when the shares are of something else.
    Writes ``path`` and its .json; returns the picture's path.
    Raises ValueError for a table that is empty, ragged or outside [0, 1].
    """
    values = _matrix(density)
    count, width = values.shape
    data = {"density": values, "columns": columns, "rows": rows, "title": title, "label": label}

    def draw(figure: Any) -> None:
        from matplotlib import colormaps
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        colours = colormaps[HEAT].with_extremes(bad="#d8dee4")
        mesh = axes.imshow(values, vmin=0, vmax=1, cmap=colours, aspect="auto", interpolation="nearest")
        axes.grid(False)
        if values.size <= 240:  # few enough cells to read their numbers
            for (row, column), value in np.ndenumerate(values):
                number = "–" if math.isnan(value) else f"{100 * value:.0f}"
                shade = "white" if value < 0.5 else INK
                axes.text(column, row, number, ha="center", va="center", fontsize=9, color=shade)
        axes.set_xlabel(columns)
        axes.set_ylabel(rows)
        axes.xaxis.set_major_locator(MaxNLocator(min(width, 16), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(min(count, 16), integer=True))
        axes.set_title(title or f"Attention density by {rows} and {columns}: mean {100 * np.nanmean(values):.1f} %")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28)
        bar.set_label(f"{label} (%)" if values.size <= 240 else label)
        if values.size <= 240:
            bar.set_ticks([0, 0.25, 0.5, 0.75, 1.0], labels=["0", "25", "50", "75", "100"])
        bar.outline.set_visible(False)

    row_height = 0.3 if values.size <= 240 else 0.19
    size = (min(12.0, max(6.4, 2.4 + 0.36 * width)), min(10.0, max(3.4, 1.5 + row_height * count)))
    return render("density_heatmap", path, data, draw, size)
