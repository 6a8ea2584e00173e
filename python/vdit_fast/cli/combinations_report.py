"""The table, the verdict and the picture of the comparison of combinations, from its JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdit_fast import report
from vdit_fast.cli import cells as table_cells

LEGEND = (
    "attention: pairs of queries and keys computed, of those of a run that computes every step densely; forecast: "
    "forwards of the transformer that were not run; PSNR and flicker PSNR in dB, SSIM and relative L2 of the final "
    "latents against the stock clip; memory: most beyond what was in use before the run; seconds of the denoising "
    "loop, median (min-max); speed-ups from ratios within a round; GFLOP/s: operations of "
    "the stock run over these seconds"
)
HEADERS = (
    "configuration",
    "attention",
    "forecast",
    "PSNR",
    "SSIM",
    "flicker",
    "latents",
    "memory",
    "seconds",
    "vs stock",
    "vs compiled",
    "GFLOP/s",
)
SPEED = HEADERS.index("memory")
"""From this column on the table is about time and memory."""


def verdict(document: dict[str, Any]) -> str:
    """The fastest configuration that keeps the wanted PSNR, and whether the goal is reached or what is in the way."""
    s = document["settings"]
    goal, floor = s["goal"], s["floor"]
    rows = [row for row in document["rows"] if row["group"] != "baseline"]
    good = [row for row in rows if row["psnr"] >= floor]
    if not good:
        return f"no configuration keeps {floor:g} dB"
    best = max(good, key=lambda row: row["speedup"]["median"])
    found = f"{best['name']}: {report.format_ratio(best['speedup']['median'])} over stock at {best['psnr']:.1f} dB"
    if best["speedup"]["median"] >= goal:
        return f"the goal of {goal:g}x at {floor:g} dB is reached: {found}"
    fast = [row for row in rows if row["speedup"]["median"] >= goal]
    why = "no configuration is that fast"
    if fast:
        nearest = max(fast, key=lambda row: row["psnr"])
        why = (
            f"quality limits it: {nearest['name']} has {report.format_ratio(nearest['speedup']['median'])} "
            f"but {nearest['psnr']:.1f} dB"
        )
    return f"the goal of {goal:g}x at {floor:g} dB is missed; the fastest that keeps it is {found}; {why}"


def cells(document: dict[str, Any]) -> list[list[str]]:
    """The table's rows under ``HEADERS``, in the order of the document."""
    return [_cells(row) for row in document["rows"]]


def _cells(row: dict[str, Any]) -> list[str]:
    percent = report.format_percent
    cache = row.get("cache")
    forecast = ""
    if cache:
        skipped, full = sum(cache["forecast"].values()), sum(cache["full"].values())
        forecast = percent(skipped / max(skipped + full, 1))
    peak = row["peak_bytes"]
    return [
        row["name"],
        percent(row["attention"]) if "attention" in row else "",
        forecast,
        *(table_cells.quality(row, key) for key in ("psnr", "ssim", "flicker_psnr", "latent_relative_l2")),
        f"{peak / 2**20:,.0f} MiB" if peak is not None else "",
        table_cells.seconds(row["seconds"]),
        table_cells.ratio(row["speedup"]),
        table_cells.ratio(row["speedup_compiled"]) if "speedup_compiled" in row else "",
        f"{row['dense_equivalent_gflops']:,.0f}",
    ]


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """The trade-off between speed and quality; exact configurations lie beyond any PSNR and are left out."""
    points = [
        {
            "label": row["name"],
            "speedup": row["speedup"]["median"],
            "psnr": row["psnr"],
            "group": row["group"],
        }
        for row in document["rows"]
        if row["group"] not in ("baseline", "kernels")
    ]
    if not points:
        return []
    s = document["settings"]
    title = f"Speed against quality: demo model, {s['tokens']:,} tokens, {s['steps']} steps"
    return [report.pareto(points, folder / "combinations.png", title=title)]
