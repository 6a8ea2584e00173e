"""Line and point plots: quality against density, speed against quality, frames over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import INK, LINES, MARKERS, PAPER, SOFT, colour, render


def _numbers(values: Any, name: str) -> list[float]:
    """A non-empty list of floats; "inf" strings (from JSON) are read. Raises ValueError naming ``name``."""
    try:
        numbers = [float(v) for v in (values.tolist() if hasattr(values, "tolist") else values)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a list of numbers; pass numbers") from error
    if not numbers or any(math.isnan(v) for v in numbers):
        raise ValueError(f"{name} is empty or holds NaN; pass at least one finite number")
    return numbers


def _series(curves: Mapping[str, Any], wanted: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Curves checked and sorted by their first column."""
    if not curves:
        raise ValueError("curves is empty; pass {name: {" + ", ".join(repr(w) for w in wanted) + "}}")
    out: dict[str, Any] = {}
    for name, curve in curves.items():
        missing = [w for w in wanted if w not in curve]
        if missing:
            raise ValueError(f"curves[{name!r}] lacks {missing[0]!r}; pass {', '.join(wanted)}")
        columns = [w for w in (*wanted, *optional) if curve.get(w) is not None]
        values = {c: _numbers(curve[c], f"curves[{name!r}][{c!r}]") for c in columns}
        if len({len(v) for v in values.values()}) > 1:
            raise ValueError(f"curves[{name!r}] has columns of different lengths; pass one value per point")
        if not all(0 < d <= 1 for d in values["density"]):
            raise ValueError(f"curves[{name!r}]['density'] leaves (0, 1]; pass the fraction of pairs that are read")
        order = sorted(range(len(values[wanted[0]])), key=lambda i: values[wanted[0]][i])
        out[name] = {c: [v[i] for i in order] for c, v in values.items()}
    return out


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def recall_curve(
    curves: Mapping[str, Any], path: str | Path, *, title: str = "Attention mass kept at a given density"
) -> Path:
    """Attention-mass recall against density: ``{name: {"density": [...], "recall": [...]}}``, both fractions.

    Name a curve "oracle" for the best possible selection (drawn black and dashed). A faint diagonal marks random
    selection. Writes ``path`` and its .json; returns the picture's path. Raises ValueError for bad curves.
    """
    data = _series(curves, ("density", "recall"))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=":", label="random selection")
        index = 0
        for name, curve in data.items():
            oracle = name.lower() == "oracle"
            style: dict[str, Any] = {"color": INK, "linestyle": "--"}
            if not oracle:
                style = {"color": colour(index), "linestyle": "-"}
            marker = MARKERS[index % len(MARKERS)] if not oracle else "."
            if len(curve["density"]) == 1:  # one point, above the lines that it is compared with
                style |= {"linestyle": "none", "markersize": 10, "markeredgecolor": "white", "zorder": 4}
            axes.plot(curve["density"], curve["recall"], marker=marker, label=name, **style)
            index += not oracle
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.03)
        _percent_axis(axes.xaxis)
        _percent_axis(axes.yaxis)
        axes.set_xlabel("density (share of query-key pairs read)")
        axes.set_ylabel("recall (share of attention mass kept)")
        axes.set_title(title)
        axes.legend(loc="lower right")

    return render("recall_curve", path, {"curves": data, "title": title}, draw, (6.8, 4.6))


def _spots() -> list[tuple[float, float]]:
    """Offsets of a label from its point, in points, the preferred ones first: near, then further out."""
    near = [(0, 1), (0, -1), (1, 0), (-1, 0), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)]
    return [(distance * x, distance * y) for distance in (9, 24, 39, 54, 70) for x, y in near]


def _place_labels(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Point labels above, below or beside, where they cover no other label, no point and not the frame.

    One that finds no place near its point stands further out, with a thin line to it.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.canvas.draw()
    renderer, frame, dot = figure.canvas.get_renderer(), axes.get_window_extent(), figure.dpi / 72
    pixel = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken: list[Any] = []
    for number, (x, y, text) in enumerate(points):
        probe = axes.text(x, y, text, fontsize=10)
        size = probe.get_window_extent(renderer)
        probe.remove()

        def place(spot: tuple[float, float], number: int = number, size: Any = size) -> Any:
            (px, py), (dx, dy) = pixel[number], spot
            left = px + dot * dx - size.width * (0.5 if dx == 0 else float(dx < 0))
            low = py + dot * dy - size.height * (0.5 if dy == 0 else float(dy < 0))
            return Bbox.from_bounds(left, low, size.width, size.height)

        def clash(spot: tuple[float, float], number: int = number, place: Any = place) -> float:
            box = place(spot)
            wide = box.padded(5 * dot)
            hits = sum(box.overlaps(other) for other in taken)
            hits += sum(wide.contains(*at) for i, at in enumerate(pixel) if i != number)
            return hits + 2 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)

        spot = min(_spots(), key=clash)  # the first of the best
        taken.append(place(spot))
        far = math.hypot(*spot) > 14
        line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4} if far else None
        dx, dy = spot
        note = axes.annotate(
            text,
            (x, y),
            xytext=spot,
            textcoords="offset points",
            ha="center" if dx == 0 else "left" if dx > 0 else "right",
            va="center" if dy == 0 else "bottom" if dy > 0 else "top",
            fontsize=10,
            color=INK,
            arrowprops=line,
        )
        note.set_path_effects([withStroke(linewidth=3, foreground=PAPER)])


def _infinite_tick(axes: Any, highest: float, top: float) -> None:
    """Marks the height ``top`` as infinity and drops the numbers above the ``highest`` finite value."""
    low, high = axes.get_ylim()
    ticks = [t for t in axes.get_yticks() if low <= t <= highest + 0.3 * (top - highest)]
    axes.set_yticks([*ticks, top], labels=[*(f"{t:g}" for t in ticks), "∞"])
    axes.set_ylim(low, high)


QUALITY = {
    "psnr": "PSNR against dense (dB)",
    "ssim": "SSIM against dense",
    "flicker_psnr": "flicker PSNR against dense (dB)",
    "relative_l2": "relative L2 error of latents (lower is better)",
    "cosine": "cosine with dense",
}


def pareto(
    points: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str = "psnr",
    title: str = "Speed against quality",
) -> Path:
    """Speed-up against quality, one labelled point per setting, with the line of settings that no other one beats.

    ``points``: dicts with ``label``, ``speedup`` (times the dense baseline), ``metric``'s value, and optionally
    ``group`` (one colour per group). An infinite PSNR is drawn on a line of its own, marked ∞. ``metric`` is one of
    psnr, ssim, flicker_psnr, cosine (higher is better) or relative_l2 (lower is better).
    Writes ``path`` and its .json; returns the picture's path. Raises ValueError for bad points or metric.
    """
    if metric not in QUALITY:
        raise ValueError(f"metric is {metric!r}; pass one of {', '.join(QUALITY)}")
    rows: list[dict[str, Any]] = []
    for index, point in enumerate(points):
        missing = [key for key in ("label", "speedup", metric) if point.get(key) is None]
        if missing:
            raise ValueError(f"points[{index}] lacks {missing[0]!r}; pass label, speedup and {metric}")
        speed, value = _numbers([point["speedup"], point[metric]], f"points[{index}]")
        if not (0 < speed < math.inf):
            raise ValueError(f"points[{index}]['speedup'] is {speed}; pass a finite number above 0")
        rows.append({"label": str(point["label"]), "speedup": speed, metric: value, "group": point.get("group")})
    if not rows:
        raise ValueError("points is empty; pass at least one point")
    finite = [r[metric] for r in rows if math.isfinite(r[metric])]
    spread = (max(finite) - min(finite) if finite else 0.0) or max(abs(finite[0]) * 0.02 if finite else 1.0, 1e-6)
    top = (max(finite) if finite else 50.0) + 0.35 * spread

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = [(r["speedup"], r[metric] if math.isfinite(r[metric]) else top) for r in rows]
        sign = -1.0 if metric == "relative_l2" else 1.0
        best = [a for a in places if not any(b != a and b[0] >= a[0] and sign * b[1] >= sign * a[1] for b in places)]
        best = sorted(set(best))
        axes.plot(*zip(*best, strict=True), color=SOFT, linewidth=1.4, linestyle="--", zorder=1, label="best trade-off")
        groups = list(dict.fromkeys(r["group"] for r in rows))
        for index, group in enumerate(groups):
            mine = [p for p, r in zip(places, rows, strict=True) if r["group"] == group]
            axes.scatter(
                *zip(*mine, strict=True),
                s=64,
                color=colour(index),
                marker=MARKERS[index % len(MARKERS)],
                edgecolors="white",
                linewidths=0.8,
                label=group,
                zorder=3,
            )
        axes.axvline(1.0, color=SOFT, linewidth=1.0, linestyle=":")
        axes.margins(x=0.16, y=0.2)
        if len(finite) < len(rows):
            _infinite_tick(axes, max(finite, default=0.0), top)
        axes.set_xlabel("speed-up over dense (×)")
        axes.set_ylabel(QUALITY[metric])
        axes.set_title(title)
        axes.legend(loc="best")
        _place_labels(axes, [(x, y, r["label"]) for (x, y), r in zip(places, rows, strict=True)])

    return render("pareto", path, {"points": rows, "metric": metric, "title": title}, draw, (7.2, 4.8))


def per_frame_psnr(
    curves: Mapping[str, Any], path: str | Path, *, title: str = "PSNR of every frame against dense"
) -> Path:
    """PSNR per frame: ``{name: [dB, ...]}``; infinite values (or "inf") (identical frames) are open
    marks on a line of their own, ∞.

    Writes ``path`` and its .json; returns the picture's path. Raises ValueError for empty curves.
    """
    if not curves:
        raise ValueError("curves is empty; pass {name: [dB per frame]}")
    data = {name: _numbers(values, f"curves[{name!r}]") for name, values in curves.items()}
    finite = [v for values in data.values() for v in values if math.isfinite(v)] or [50.0]
    top = max(finite) + max(1.0, 0.15 * (max(finite) - min(finite)))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for index, (name, values) in enumerate(data.items()):
            kept = [v for v in values if math.isfinite(v)]
            label = f"{name} (mean {sum(kept) / len(kept):.1f} dB)" if kept else f"{name} (identical)"
            line = [v if math.isfinite(v) else math.nan for v in values]
            style = {"color": colour(index), "linestyle": LINES[index % len(LINES)]}
            axes.plot(line, marker=MARKERS[index % len(MARKERS)], markersize=4, label=label, **style)
            exact = [i for i, v in enumerate(values) if not math.isfinite(v)]
            axes.plot(exact, [top] * len(exact), "o", markersize=6, mfc="none", mec=colour(index))
        axes.set_ylim(min(finite) - 0.1 * (top - min(finite)) - 0.5, top + 0.1 * (top - min(finite)) + 0.5)
        if any(not math.isfinite(v) for values in data.values() for v in values):
            _infinite_tick(axes, max(finite), top)
        axes.set_xlim(-0.5, max(len(values) for values in data.values()) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("frame")
        axes.set_ylabel("PSNR (dB)")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=3)

    return render("per_frame_psnr", path, {"curves": data, "title": title}, draw, (8.6, 3.4))


def speed_curve(
    curves: Mapping[str, Any], path: str | Path, *, title: str = "Speed-up of sparse attention over dense"
) -> Path:
    """Speed-up against density: ``{name: {"density": [...], "speedup": [...], "low": [...], "high": [...]}}``.

    Density is a fraction, speed-up a factor over the dense baseline; ``low`` and ``high`` (optional) shade the spread.
    The ideal 1 / density is drawn. Both axes are logarithmic, so the ideal is straight. Writes ``path`` and its
    .json; returns the picture's path. Raises ValueError for bad curves.
    """
    data = _series(curves, ("density", "speedup"), ("low", "high"))
    lowest = min(d for c in data.values() for d in c["density"])
    if not all(0 < v < math.inf for c in data.values() for column in c.values() for v in column):
        raise ValueError("curves hold a speed-up that is not a finite number above 0; pass factors over dense")

    def draw(figure: Any) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axes = figure.subplots()
        ideal = [lowest, 1.0]
        axes.plot(ideal, [1 / d for d in ideal], color=SOFT, linewidth=1.4, linestyle=":", label="ideal, 1 / density")
        axes.axhline(1.0, color=SOFT, linewidth=1.0)
        for index, (name, curve) in enumerate(data.items()):
            style = {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}
            axes.plot(curve["density"], curve["speedup"], linestyle=LINES[index % len(LINES)], label=name, **style)
            if "low" in curve and "high" in curve:
                axes.fill_between(curve["density"], curve["low"], curve["high"], color=colour(index), alpha=0.18, lw=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.invert_xaxis()
        ticks = [1.0]
        for density in sorted({d for c in data.values() for d in c["density"]}, reverse=True):
            if density < 0.8 * ticks[-1]:  # room for the numbers
                ticks.append(density)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
        low, high = axes.get_ylim()
        marks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if low <= t <= high]
        axes.yaxis.set_major_locator(FixedLocator(marks))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("density (share of query-key pairs read, log scale)")
        axes.set_ylabel("speed-up over dense (log scale)")
        axes.set_title(title)
        axes.legend(loc="upper left")

    return render("speed_curve", path, {"curves": data, "title": title}, draw, (6.8, 4.6))
