"""The profile's tables and pictures, from its JSON document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdit_fast import report
from vdit_fast.cli.mass import DENSITIES

if TYPE_CHECKING:
    from vdit_fast.cli.probing import Notes

HEADERS = ("layer", "heads", "best 10%", "best 25%", "blocks 25%", "kept", "possible")
LEGEND = (
    "attention mass held by the best 10 % and 25 % of the query-key pairs, by the best 25 % of square blocks, by what "
    "the method reads, and by the best selection of as many pairs"
)


def numbers(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, as lines of (name, value)."""
    cost, tokens, percent = document["cost"], document["tokens"], report.format_percent
    grid = " × ".join(map(str, tokens["grid"])) if tokens["grid"] else "unknown"
    rows = [
        ("work", f"{grid} = {tokens['video']:,} tokens and {tokens['text']} of text, {document['steps']} steps"),
        ("attention's share of a forward, a", percent(cost["attention_share"])),
        ("limit of any sparsity, 1 / (1 − a)", report.format_ratio(cost["limit"])),
        ("calls that are sparse, s", percent(cost["sparse_share"])),
    ]
    if cost["density"] is not None:
        rows += [
            ("density of their plans, d", percent(cost["density"])),
            ("speed per pair against dense, e", percent(cost["efficiency"])),
            ("planning against dense attention, p", percent(cost["overhead"])),
            ("expected in a sparse step", report.format_ratio(cost["sparse_step_speedup"])),
            ("expected in the whole run", report.format_ratio(cost["speedup"])),
        ]
    return rows


def cells(document: dict[str, Any]) -> list[list[str]]:
    """One row per layer: how its heads are, and means over them."""
    layers: dict[int, list[dict[str, Any]]] = {}
    for row in document["heads"]:
        layers.setdefault(row["layer"], []).append(row)
    table = []
    for layer, heads in layers.items():
        kinds = Counter(row["character"] for row in heads)
        tenth, quarter = DENSITIES.index(0.1), DENSITIES.index(0.25)
        values = [
            _percent([row["best"][tenth] for row in heads]),
            _percent([row["best"][quarter] for row in heads]),
            _percent([row["blocks"][quarter] for row in heads]),
            *(_percent([row[key] for row in heads]) for key in ("recall", "reachable")),
        ]
        table.append([str(layer), ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), *values])
    return table


def _percent(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return str(report.format_percent(sum(known) / len(known))) if known else "dense"


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Recall curves, and layer × head maps of what the planner keeps and of the heads' character."""
    if not document["heads"]:
        return []
    name = document["planner"]["method"]
    title = "Attention mass kept at a given density"
    files = [report.recall_curve(document["curves"], folder / "recall.png", title=title)]
    values = {(row["layer"], row["head"]): row for row in document["heads"]}
    temporal = {at: row["near_places"] / (row["near_frames"] + row["near_places"]) for at, row in values.items()}
    files.append(_heat(temporal, folder / "character.png", "Heads from spatial (0) to temporal (100)", "temporal"))
    if any(row["recall"] is not None for row in document["heads"]):
        for key, heading in (("density", "share of the keys read"), ("recall", "attention mass kept")):
            table = {at: row[key] for at, row in values.items()}
            files.append(_heat(table, folder / f"{key}_map.png", f"{name}: {heading}", heading))
    return files


def _heat(values: dict[tuple[int, int], float | None], path: Path, title: str, what: str) -> Path:
    layers, heads = sorted({layer for layer, _ in values}), max(head for _, head in values) + 1
    table = [[values.get((layer, head)) for head in range(heads)] for layer in layers]
    return report.density_heatmap(table, path, title=title, label=what)


def draw_plan(document: dict[str, Any], notes: Notes, folder: Path) -> list[Path]:
    """The plan of the middle layer at the last look, in the model's order and in the computed one."""
    if not notes.plans:
        return []
    last = max(step for step, _, _ in notes.plans)
    mine = [(layer, plan) for step, layer, plan in notes.plans if step == last]
    layer, plan = mine[len(mine) // 2]
    tokens = document["tokens"]
    title = f"{document['planner']['method']}: keys read at step {last}, layer {layer}, head 0"
    options = {"grid": tokens["grid"], "text": tokens["text"], "text_first": tokens["text_first"]}
    return [report.plan_heatmap(plan, folder / "plan.png", title=title, **options)]
