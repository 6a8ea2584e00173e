"""Text picture of a plan."""

from __future__ import annotations

import torch

from .bits import popcount
from .plan import AttentionPlan

SHADES = " .:-=+*#%@"


def draw_plan(plan: AttentionPlan, *, batch: int = 0, head: int = 0, width: int = 48) -> str:
    """Rows are query positions, columns key positions, both in tile order; " " reads nothing and "@" reads everything.

    A cell between the two shows the fraction of its pairs that are read. Cost depends on the runs of one head, not on
    lq * lk.
    """
    for name, value, count in (("batch", batch, plan.batch), ("head", head, plan.heads)):
        if not 0 <= value < count:
            raise ValueError(f"{name} must lie in [0, {count}), got {value}")
    if width < 1:
        raise ValueError(f"width must be at least 1 character, got {width}")
    plan = plan.to("cpu")
    columns, lines = min(width, plan.lk), min(max(1, width // 2), plan.lq)
    tile, runs = plan._used_runs()
    chosen = plan.tiles[tile, 0] == batch * plan.heads + head
    tile, runs = tile[chosen], runs[chosen]
    weight = torch.ones(len(runs), dtype=torch.float64)
    if plan.mask_bits is not None:  # a partial run counts with the fraction of its bits that are set
        bits = runs[:, 2] >= 0
        ones = torch.nn.functional.pad(popcount(plan.mask_bits).cumsum(0), (1, 0))
        rows, length, offset = plan.tiles[tile, 2].long()[bits], runs[bits, 1], runs[bits, 2]
        weight[bits] = (ones[offset + rows * ((length + 31) // 32)] - ones[offset]).double() / (rows * length)

    key_edges = torch.linspace(0, plan.lk, columns + 1, dtype=torch.float64)
    row_edges = torch.linspace(0, plan.lq, lines + 1, dtype=torch.float64)
    start, rows = plan.tiles[:, 1].double(), plan.tiles[:, 2].double()
    keys = _overlap(runs[:, 0].double(), runs[:, 1].double(), key_edges) * weight[:, None]
    per_tile = torch.zeros(len(plan.tiles), columns, dtype=torch.float64).index_add_(0, tile, keys)
    pairs = _overlap(start, rows, row_edges).T @ per_tile
    cell = (row_edges[1:] - row_edges[:-1])[:, None] * (key_edges[1:] - key_edges[:-1])[None, :]
    share = (pairs / cell).clamp(0, 1)
    # "@" only for full cells and " " only for empty ones, so that small leftovers stay visible
    shade = torch.where(share > 0, (share * 9 + 1e-9).floor().clamp(1, 9), torch.zeros_like(share)).long()
    shade = torch.where((shade == 9) & (share < 1 - 1e-9), torch.full_like(shade, 8), shade)
    title = (
        f"{plan.lq} x {plan.lk}, head {head} of {plan.heads}, density {float(plan.density_per_head[batch, head]):.3f}"
    )
    frame = "+" + "-" * columns + "+"
    body = ["|" + "".join(SHADES[i] for i in line) + "|" for line in shade.tolist()]
    return "\n".join([title, frame, *body, frame])


def _overlap(start: torch.Tensor, length: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Length of ``[start, start + length)`` inside every cell between edges: ``[n]`` and ``[c + 1]`` to ``[n, c]``."""
    inside = (edges[None, :] - start[:, None]).clamp(min=0).minimum(length[:, None])
    return inside[:, 1:] - inside[:, :-1]
