"""The comparison's verdict, table and pictures, from its JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdit_fast import report
from vdit_fast.cli import cells as table_cells

if TYPE_CHECKING:
    from vdit_fast.cli.methods_bench import Contestant

FAVOURITE = "svg2"
SAME_DB = 0.3
"""Methods whose PSNR differs by less count as equally good; the faster one wins."""
LEGEND = (
    "density: share of the pairs that sparse calls read (! not matched), all calls: that of the whole run; "
    "PSNR and flicker PSNR in dB, SSIM and relative L2 of the final latents against the stock clip; "
    "mass: attention mass that the plans read, on recorded calls; planning: its time in sparse and search calls over "
    "that of dense attention; seconds of the denoising loop, median (min-max); speed-ups from ratios within a round"
)
HEADERS = (
    "method",
    "density",
    "all calls",
    "PSNR",
    "SSIM",
    "flicker",
    "latents",
    "mass",
    "setting",
    "planning",
    "seconds",
    "vs stock",
    "vs own dense",
)


SPEED = HEADERS.index("setting")
"""From this column on the table is about time."""


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The method of the highest PSNR among those of matched density; among equals the fastest."""
    fair = [row for row in rows if row["matched"]] or list(rows)
    top = max(row["psnr"] for row in fair)
    return max((r for r in fair if r["psnr"] > top - SAME_DB), key=lambda r: r["speedup"]["median"])


def verdict(document: dict[str, Any]) -> str:
    """Whether SVG2 is the best method here; otherwise which one is, and what the numbers say about why."""
    rows = {row["method"]: row for row in document["methods"]}
    if not rows:
        return "no method was sparse: nothing is known"
    winner = best(list(rows.values()))
    name, near = winner["method"], report.format_percent(winner["density"]["sparse_calls"])
    head = f"{name} is the best at a density of {near}: PSNR {winner['psnr']:.1f} dB, {_ratio(winner)} over stock"
    tail = _outside(document["methods"])
    favourite = rows.get(FAVOURITE)
    if favourite is None:
        return f"{head}; {FAVOURITE} was not measured{tail}"
    if favourite is winner:
        others = [row for row in rows.values() if row is not winner and row["matched"]]
        if not others:
            return f"{head}; it was alone{tail}"
        second = best(others)
        return f"{head}; next is {second['method']} with {second['psnr']:.1f} dB, {_ratio(second)}{tail}"
    lead = f"{FAVOURITE} is not the best: {head}; {FAVOURITE} has {favourite['psnr']:.1f} dB, {_ratio(favourite)}"
    return f"{lead}. {_why(winner, favourite)}{tail}"


def _why(winner: dict[str, Any], loser: dict[str, Any]) -> str:
    """What the measured numbers say about a difference; several may hold."""
    found = []
    name, other = winner["method"], loser["method"]
    kept, lost = winner["recall"], loser["recall"]
    if kept is not None and lost is not None:
        masses = f"{report.format_percent(kept)} of the attention mass against {report.format_percent(lost)}"
        if kept > lost + 0.005:
            found.append(f"it reads {masses} at this density")
        elif winner["corrected"]:
            found.append(f"it reads {masses}, but makes up for what it leaves out (scale, residual or stand-ins)")
        elif winner["psnr"] > loser["psnr"]:
            found.append(f"not by the mass it reads ({masses})")
    errs, misses = winner.get("output_error"), loser.get("output_error")
    if errs is not None and misses is not None and errs < 0.95 * misses:
        near = f"its attention output errs by {report.format_percent(errs)} against {report.format_percent(misses)}"
        if kept is not None and lost is not None and kept <= lost and not winner["corrected"]:
            near += ": what it leaves out resembles what it reads, so that less mass gives a better mean of the values"
        found.append(near)
    if winner["density"]["overall"] > loser["density"]["overall"] + 0.02:
        whole = (report.format_percent(row["density"]["overall"]) for row in (winner, loser))
        found.append("it computes more over the whole run: {} against {} of all pairs".format(*whole))
    if not loser["matched"] or not winner["matched"]:
        found.append("the densities are not matched")
    if winner["psnr"] <= loser["psnr"] + SAME_DB:
        plan = (report.format_percent(row["overhead"]) for row in (winner, loser))
        found.append("equally good and faster, planning costs {} against {} of dense attention".format(*plan))
    return f"{name} over {other}: " + ("; ".join(found) if found else "no measured number explains it")


def _outside(rows: Sequence[dict[str, Any]]) -> str:
    names = [row["method"] for row in rows if not row["matched"]]
    return f" (density not matched: {', '.join(names)})" if names else ""


def _ratio(row: dict[str, Any]) -> str:
    return str(report.format_ratio(row["speedup"]["median"]))


def cells(document: dict[str, Any]) -> list[list[str]]:
    """The table's rows under ``HEADERS``: the two dense runs, then the methods by PSNR."""
    stock, dense = (document["baselines"][name] for name in ("stock", "dense"))
    rows = [["stock", "100%", "100%", *[""] * 7, table_cells.seconds(stock["seconds"]), "1×", ""]]
    own = [table_cells.quality(dense, key) for key in ("psnr", "ssim", "flicker_psnr", "latent_relative_l2")]
    rows.append(
        [
            "own dense",
            "100%",
            "100%",
            *own,
            "",
            "",
            "",
            table_cells.seconds(dense["seconds"]),
            table_cells.ratio(dense["speedup"]),
            "1×",
        ]
    )
    percent = report.format_percent
    for row in sorted(document["methods"], key=lambda r: -r["psnr"]):
        value = f"{row['value']:.3g}" if isinstance(row["value"], float) else str(row["value"])
        rows.append(
            [
                row["method"],
                percent(row["density"]["sparse_calls"]) + ("" if row["matched"] else " !"),
                percent(row["density"]["overall"]),
                *(table_cells.quality(row, key) for key in ("psnr", "ssim", "flicker_psnr", "latent_relative_l2")),
                percent(row["recall"]) if row["recall"] is not None else "",
                f"{row['knob']}={value}",
                percent(row["overhead"]),
                table_cells.seconds(row["seconds"]),
                table_cells.ratio(row["speedup"]),
                table_cells.ratio(row["speedup_own"]),
            ]
        )
    return rows


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Pictures that the document alone makes: the trade-off, and per method density and time."""
    rows = document["methods"]
    if not rows:
        return []
    what = f"demo model, {document['settings']['tokens']:,} tokens, {document['settings']['steps']} steps"
    points = [_point(row, all(other["matched"] for other in rows)) for row in rows]
    files = [report.pareto(points, folder / "pareto.png", title=f"Speed against quality: {what}")]
    for row in rows:
        name, density = row["method"], row["density"]
        title = f"{name}: share of the keys read, sparse steps"
        files.append(report.density_heatmap(density["layer_head"], folder / f"density_{name}.png", title=title))
        title = f"{name}: seconds per denoising step"
        files.append(report.step_timeline(row["steps"], folder / f"steps_{name}.png", title=title))
    return files


def _point(row: dict[str, Any], alike: bool) -> dict[str, Any]:
    """A point of the trade-off; one of another density says which, in another colour."""
    density = "" if row["matched"] else f" ({report.format_percent(row['density']['sparse_calls'])})"
    group = None if alike else "matched density" if row["matched"] else "another density"
    return {
        "label": row["method"] + density,
        "speedup": row["speedup"]["median"],
        "psnr": row["psnr"],
        "group": group,
    }


def draw_plans(contestants: Sequence[Contestant], grid: tuple[int, int, int], layer: int, folder: Path) -> list[Path]:
    """The middle sparse step's plan of every method, in the model's order and in the computed one."""
    files = []
    for one in contestants:
        if one.plans:
            step, plan = one.plans[len(one.plans) // 2]
            title = f"{one.name}: keys read at step {step}, layer {layer}, head 0"
            files.append(report.plan_heatmap(plan, folder / f"plan_{one.name}.png", grid=grid, title=title))
    return files
