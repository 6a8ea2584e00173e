"""Which keys a few query rows read, without the mask of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import unpack_rows
from .plan import AttentionPlan


def plan_rows(plan: AttentionPlan, rows: Tensor, *, batch: int = 0, head: int = 0) -> Tensor:
    """The rows ``to_mask()[batch, head, rows]``, at a cost of ``len(rows) * lk`` instead of ``lq * lk``.

    Args:
        rows: int64 ``[R]``, original query indices, on the plan's device.
        batch, head: which of the plan's; those of a plan with one item or head hold for all.

    Returns:
        bool ``[R, lk]`` in original key order; stand-ins and segments are not part of it.

    Raises:
        ValueError: a batch or head that the plan does not have.
    """
    for name, value, count in (("batch", batch, plan.batch), ("head", head, plan.heads)):
        if count > 1 and not 0 <= value < count:
            raise ValueError(f"{name} must lie in [0, {count}), got {value}")
    batch, head, device = batch % plan.batch, head % plan.heads, plan.device
    place = rows if plan.q_order is None else _inverse(plan.q_order, batch, head)[rows]

    tiles = plan.tiles.long()
    mine = torch.nonzero((tiles[:, 0] == batch * plan.heads + head) & (tiles[:, 2] > 0)).flatten()
    mine = mine[tiles[mine, 1].argsort()]
    start, length = tiles[mine, 1], tiles[mine, 2]
    slot = torch.searchsorted(start, place, right=True) - 1
    inside = (slot >= 0) & (place < (start + length)[slot.clamp(min=0)]) if len(mine) else slot >= 0
    query = torch.nonzero(inside).flatten()  # rows of no tile read nothing
    tile = mine[slot[query]]

    first, last = plan.run_ptr[tile].long(), plan.run_ptr[tile + 1].long()
    owner = torch.repeat_interleave(torch.arange(len(query), device=device), last - first)
    before = (last - first).cumsum(0) - (last - first)
    index = torch.arange(len(owner), device=device) - before[owner] + first[owner]
    runs, row = plan.runs[index].long(), query[owner]

    full = runs[:, 2] < 0
    edges = torch.zeros(len(rows), plan.lk + 1, dtype=torch.int32, device=device)
    one = torch.ones(int(full.sum()), dtype=torch.int32, device=device)
    edges.index_put_((row[full], runs[full, 0]), one, accumulate=True)
    edges.index_put_((row[full], runs[full, 0] + runs[full, 1]), -one, accumulate=True)
    mask = edges.cumsum(1)[:, : plan.lk] > 0
    if plan.mask_bits is not None:
        runs, row, owner = runs[~full], row[~full], owner[~full]
        line = place[row] - tiles[tile[owner], 1]
        for size in runs[:, 1].unique().tolist():
            here = runs[:, 1] == size
            words = (size + 31) // 32
            at = (runs[here, 2] + line[here] * words)[:, None] + torch.arange(words, device=device)
            columns = runs[here, 0][:, None] + torch.arange(size, device=device)
            mask[row[here][:, None], columns] = unpack_rows(plan.mask_bits[at], size)
    return mask if plan.kv_order is None else mask[:, _inverse(plan.kv_order, batch, head)]


def _inverse(order: Tensor, batch: int, head: int) -> Tensor:
    """Permuted position of every original token of one head."""
    return order[min(batch, order.shape[0] - 1), min(head, order.shape[1] - 1)].long().argsort()
