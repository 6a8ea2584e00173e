"""Union of two plans."""

from __future__ import annotations

import torch
from torch import Tensor

from .builders import mask_plan
from .plan import AttentionPlan

MASK_LIMIT = 2**28


def union(a: AttentionPlan, b: AttentionPlan) -> AttentionPlan:
    """Plan in which a query reads a key when it does in ``a`` or in ``b``. Exact; reads values back to the host.

    Plans with the same tiles and orders and no mask bits have their run lists merged, whatever their size. Others go
    through a boolean mask (in the common order if they share one), which must have at most 2**28 entries.

    Raises:
        ValueError: shapes, segments or devices differ, or the mask would be too large.
    """
    if a.shape != b.shape:
        raise ValueError(f"cannot unite plans of shapes {a.shape} and {b.shape}; build both for the same shape")
    if a.segments != b.segments:
        raise ValueError(
            f"cannot unite plans with segments {a.segments} and {b.segments}; use with_segments after the union"
        )
    if a.stand_ins is not None or b.stand_ins is not None:
        raise ValueError("cannot unite plans with stand-ins; unite the block masks, then build with compensate=True")
    if a.device != b.device:
        raise ValueError(f"cannot unite plans on {a.device} and {b.device}; move one with .to(device)")
    shared = _same_order(a, b, "q") and _same_order(a, b, "kv")
    if shared and a.mask_bits is None and b.mask_bits is None:
        tiles_a, place_a = _sorted_tiles(a)
        tiles_b, place_b = _sorted_tiles(b)
        if torch.equal(tiles_a, tiles_b):
            return _merge(a, b, tiles_a, place_a, place_b)
    batch, heads, lq, lk = a.shape
    if batch * heads * lq * lk > MASK_LIMIT:
        raise ValueError(
            f"the union of plans with different tiles or orders, or with mask bits, needs a mask of "
            f"{batch}x{heads}x{lq}x{lk} entries, more than {MASK_LIMIT}; build both from the same blocks and orders, "
            "or unite their block masks before building"
        )
    mask = a.to_mask(permuted=shared) | b.to_mask(permuted=shared)
    plan = mask_plan(mask, (64, 64), a.q_order if shared else None, a.kv_order if shared else None)
    return plan.with_segments(a.segments)


def _same_order(a: AttentionPlan, b: AttentionPlan, which: str) -> bool:
    left, right = (a.q_order, b.q_order) if which == "q" else (a.kv_order, b.kv_order)
    if left is right:
        return True
    if left is None or right is None or left.shape[-1] != right.shape[-1]:
        return False
    if left.shape != right.shape:  # the union keeps a's order, so a broadcast one on either side would change its shape
        return False
    return torch.equal(left, right)


def _sorted_tiles(plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Tiles with rows, by place (int64 ``[N, 3]``), and the sorted index of every tile of the plan (-1 if unused)."""
    tiles = plan.tiles.long()
    used = (tiles[:, 2] > 0).nonzero().squeeze(1)
    used = used[(tiles[used, 0] * plan.lq + tiles[used, 1]).argsort()]
    place = torch.full((len(tiles),), -1, device=plan.device)
    place[used] = torch.arange(len(used), device=plan.device)
    return tiles[used], place


def _merge(a: AttentionPlan, b: AttentionPlan, tiles: Tensor, place_a: Tensor, place_b: Tensor) -> AttentionPlan:
    """Interval union of the run lists, tile by tile."""
    # One number line for all tiles: lk + 1 per tile, so runs of two tiles never touch.
    stride = a.lk + 1
    first, last = [], []
    for plan, place in ((a, place_a), (b, place_b)):
        tile, runs = plan._used_runs()
        tile = place[tile]
        runs, tile = runs[tile >= 0], tile[tile >= 0]
        first.append(tile * stride + runs[:, 0])
        last.append(tile * stride + runs[:, 0] + runs[:, 1])
    start, order = torch.cat(first).sort()
    end = torch.cat(last)[order]
    reach = end.cummax(0).values if len(end) else end
    opens = torch.ones(len(start), dtype=torch.bool, device=a.device)
    opens[1:] = start[1:] > reach[:-1]
    closes = opens.roll(-1)
    start, end = start[opens], reach[closes]

    tile = start // stride
    counts = torch.zeros(len(tiles), dtype=torch.int64, device=a.device).index_add_(0, tile, torch.ones_like(tile))
    keys = torch.zeros(len(tiles), dtype=torch.int64, device=a.device).index_add_(0, tile, end - start)
    ranked = (keys * tiles[:, 2]).argsort(descending=True, stable=True)
    rank = torch.empty_like(ranked)
    rank[ranked] = torch.arange(len(ranked), device=a.device)
    moved = rank[tile].argsort(stable=True)
    run_ptr = torch.zeros(len(tiles) + 1, dtype=torch.int64, device=a.device)
    torch.cumsum(counts[ranked], 0, out=run_ptr[1:])
    runs = torch.stack((start - tile * stride, end - start, torch.full_like(start, -1)), dim=1)[moved]
    return AttentionPlan(
        *a.shape,
        tiles[ranked].to(torch.int32).contiguous(),
        run_ptr.to(torch.int32),
        runs.to(torch.int32).contiguous(),
        None,
        a.q_order,
        a.kv_order,
        a.segments,
    )
