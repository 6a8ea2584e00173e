"""A plan as a small picture: exact coverage of each pixel, without the lq x lk mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # tiles x segments held at once (128 MB in fp64)


def _pixel_shares(order: Tensor | None, length: int, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each position of the sequence: the two pixels its token touches and its share of each, in pixels."""
    token = torch.arange(length) if order is None else order.long()
    # token o covers [o, o + 1) * pixels / length; in whole numbers, so that edges are exact
    begin = token * pixels
    first = begin // length
    share = torch.minimum((first + 1) * length - begin, torch.full_like(begin, pixels)).double() / length
    rest = pixels / length - share
    return first, share, (first + 1).clamp(max=pixels - 1), rest


def _histogram(group: Tensor, groups: int, order: Tensor | None, length: int, pixels: int) -> Tensor:
    """[groups, pixels] fp64: how much of each pixel the tokens of each group cover. Negative groups are left out."""
    first, share, second, rest = _pixel_shares(order, length, pixels)
    out = torch.zeros(groups * pixels, dtype=torch.float64)
    keep = group >= 0
    for pixel, weight in ((first, share), (second, rest)):
        out.index_add_(0, (group * pixels + pixel)[keep], weight[keep])
    return out.view(groups, pixels)


def _popcount(words: Tensor) -> Tensor:
    """Set bits of each int32 word."""
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64)
    return table[words.contiguous().view(torch.uint8).long()].view(-1, 4).sum(dim=1)


def _run_weights(runs: Tensor, rows: Tensor, mask_bits: Tensor | None) -> Tensor:
    """Share of a run's query-key pairs that are read: 1 for a full run, the share of set bits for a partial one."""
    weight = torch.ones(runs.shape[0], dtype=torch.float64)
    partial = runs[:, 2] >= 0
    if mask_bits is None or not bool(partial.any()):
        return weight
    total = torch.zeros(mask_bits.numel() + 1, dtype=torch.int64)
    total[1:] = _popcount(mask_bits).cumsum(0)
    length, offset, m = runs[partial, 1], runs[partial, 2], rows[partial]
    bits = total[offset + m * ((length + 31) // 32)] - total[offset]
    weight[partial] = bits.double() / (m * length).clamp(min=1).double()
    return weight


def plan_raster(
    plan: Any, *, head: int = 0, batch: int = 0, max_pixels: int = 512, original_order: bool = True
) -> Tensor:
    """Density of one head of an AttentionPlan as an image, fp64 [min(lq, max_pixels), min(lk, max_pixels)] in [0, 1].

    Each pixel is the exact fraction of its query-key pairs that the plan reads; inside a partly masked run the set
    bits count as spread evenly. ``original_order`` places tokens as in the model's sequence, False as the kernel sees
    them (after ``q_order`` and ``kv_order``). Works on runs, so a plan of 100,000 tokens takes no token matrix.
    Raises ValueError for a head or batch outside the plan.
    """
    if not 0 <= batch < max(plan.batch, 1) or not 0 <= head < max(plan.heads, 1):
        raise ValueError(
            f"head {head} of batch {batch} is outside the plan's {plan.batch} x {plan.heads}; choose one inside"
        )
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}; pass at least 1")
    height, width = min(plan.lq, max_pixels), min(plan.lk, max_pixels)
    tiles, run_ptr = plan.tiles.cpu().long(), plan.run_ptr.cpu().long()
    orders = []
    for order in (plan.q_order, plan.kv_order):
        picked = None
        if order is not None and original_order:
            picked = order[min(batch, order.shape[0] - 1), min(head, order.shape[1] - 1)].cpu()
        orders.append(picked)

    index = torch.nonzero((tiles[:, 0] == batch * plan.heads + head) & (tiles[:, 2] > 0)).flatten()
    image = torch.zeros(height, width, dtype=torch.float64)
    counts = (run_ptr[1:] - run_ptr[:-1])[index]
    tile = torch.repeat_interleave(torch.arange(index.numel()), counts)
    place = torch.arange(tile.numel()) - (counts.cumsum(0) - counts)[tile] + run_ptr[index][tile]
    runs = plan.runs.cpu().long()[place]
    if runs.numel() == 0:
        return image
    rows = tiles[index]
    weight = _run_weights(runs, rows[tile, 2], None if plan.mask_bits is None else plan.mask_bits.cpu())

    # row coverage of every tile
    owner = torch.full((plan.lq + 1,), -1, dtype=torch.long)
    by_start = torch.argsort(rows[:, 1])
    starts, lengths = rows[by_start, 1], rows[by_start, 2]
    position = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    owner[position + torch.arange(position.numel())] = torch.repeat_interleave(by_start, lengths)
    row_cover = _histogram(owner[: plan.lq], index.numel(), orders[0], plan.lq, height)

    # column coverage of every elementary segment between neighbouring run ends
    ends = torch.unique(torch.cat([runs[:, 0], runs[:, 0] + runs[:, 1]]))
    segments = ends.numel() - 1
    segment_of = torch.searchsorted(ends, torch.arange(plan.lk), right=True) - 1
    segment_of[segment_of >= segments] = -1
    column_cover = _histogram(segment_of, segments, orders[1], plan.lk, width)

    first, last = (torch.searchsorted(ends, at) for at in (runs[:, 0].contiguous(), runs[:, 0] + runs[:, 1]))
    step = max(1, CHUNK_ELEMENTS // (segments + 1))
    for low in range(0, index.numel(), step):
        high = min(low + step, index.numel())
        here = slice(int(counts[:low].sum()), int(counts[:high].sum()))
        reads = torch.zeros((high - low) * (segments + 1), dtype=torch.float64)
        base = (tile[here] - low) * (segments + 1)
        reads.index_add_(0, base + first[here], weight[here])
        reads.index_add_(0, base + last[here], -weight[here])
        reads = reads.view(high - low, -1).cumsum(dim=1)[:, :segments]
        image += row_cover[low:high].T @ (reads @ column_cover)
    return image.clamp_(0, 1)
