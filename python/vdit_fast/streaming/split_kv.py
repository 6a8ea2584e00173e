"""Split-KV decoding on a CPU: few queries over many keys, the keys cut into parts that run as items of one batch.

The CUDA kernels cut the keys inside their one launch (docs/kernels/kv_cache.md), so nothing is cut here for them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from vdit_fast.caching.checks import count
from vdit_fast.ops.attention import attention
from vdit_fast.ops.merge import merge
from vdit_fast.plan import AttentionPlan

__all__ = ["MAX_PARTS", "choose_parts", "split_attention", "split_plan"]

MAX_PARTS = 32  # of ``merge``
_ROWS = 96  # query rows of a work item of the CPU kernel
_LEAST = 512  # keys of a part: below, the parts' results cost as much as the keys


def choose_parts(q: Tensor, k: Tensor, workers: int | None = None) -> int:
    """Into how many parts to cut the keys of a call: 1 unless its work items leave cores idle.

    Args:
        q, k: of the call; [B, Lq, H, D] and [B, Lk, Hkv, D].
        workers: cores; torch's threads by default.

    Returns:
        the most useful number that divides Lk, at most ``MAX_PARTS``; 1 on other devices than CPUs, and where k is no
        view of that many items.
    """
    batch, lq, heads, _ = q.shape
    workers = torch.get_num_threads() if workers is None else workers
    items = batch * heads * -(-lq // _ROWS)
    if q.device.type != "cpu" or items >= workers or not _viewable(k):
        return 1
    most = min(-(-workers // items), k.shape[1] // _LEAST, MAX_PARTS)
    return next((parts for parts in range(most, 1, -1) if k.shape[1] % parts == 0), 1)


def split_plan(plan: AttentionPlan, parts: int, batch: int = 1) -> AttentionPlan:
    """The plan of ``parts`` items per batch item, each with its share of the keys and with what the runs have there.

    Reads the plan's lists on the host. Its shape is (batch * parts, heads, lq, lk / parts).

    Raises:
        ValueError: parts that do not divide the keys, a plan with bit masks, a permutation of the keys or stand-ins.
    """
    count("parts", parts, 1)
    count("batch", batch, 1)
    if plan.lk % parts:
        raise ValueError(f"parts is {parts}, which does not divide {plan.lk} keys; use a divisor")
    extras = {"bit masks": plan.mask_bits, "a permutation of the keys": plan.kv_order, "stand-ins": plan.stand_ins}
    present = [name for name, value in extras.items() if value is not None]
    if present:
        raise ValueError(f"a plan with {' and '.join(present)} is not split; call attention on the whole")
    if plan.batch not in (1, batch):
        raise ValueError(f"plan is for batch {plan.batch}, the call has {batch}")
    share, pointers = plan.lk // parts, plan.run_ptr.tolist()
    runs, tiles = plan.runs.tolist(), plan.tiles.tolist()
    found: list[tuple[list[int], list[tuple[int, int, int]]]] = []
    for index, (bh, start, rows) in enumerate(tiles):
        item, head = divmod(bh, plan.heads)
        for part in range(parts):
            low, high = part * share, (part + 1) * share
            cut = [
                (max(first, low) - low, min(first + keys, high) - max(first, low), -1)
                for first, keys, _ in runs[pointers[index] : pointers[index + 1]]
                if first < high and first + keys > low
            ]
            for b in range(batch) if plan.batch == 1 else (item,):
                found.append(([(b * parts + part) * plan.heads + head, start, rows], cut))
    found.sort(key=lambda one: -one[0][2] * sum(keys for _, keys, _ in one[1]))
    ends = [0]
    for _, cut in found:
        ends.append(ends[-1] + len(cut))
    lists = ([tile for tile, _ in found], ends, [run for _, cut in found for run in cut])
    shapes = ((-1, 3), (-1,), (-1, 3))
    tensors = [
        torch.tensor(values, dtype=torch.int32, device=plan.device).view(shape)
        for values, shape in zip(lists, shapes, strict=True)
    ]
    order = plan.q_order
    if order is not None and order.shape[0] > 1:
        order = order.repeat_interleave(parts, 0)
    return AttentionPlan(
        batch * parts, plan.heads, plan.lq, share, tensors[0], tensors[1], tensors[2], q_order=order
    )  # fmt: skip


def split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    parts: int | None = None,
    split: AttentionPlan | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``vdit_fast.attention`` with the keys cut into parts, merged by their log-sum-exp. k and v are not copied.

    Args:
        q, k, v, plan, scale, return_lse: of ``attention``.
        parts: how many, dividing Lk; 1 is the plain call, bit for bit. None: ``choose_parts``.
        split: what ``split_plan`` made of the plan for these parts, where it is kept.

    Returns:
        of ``attention``. A part's result is rounded to q's dtype before it is merged.

    Raises:
        ValueError: parts that do not divide the keys, or keys that cannot be viewed as that many items.
    """
    if parts is None:
        parts = choose_parts(q, k)
    count("parts", parts, 1)
    if parts == 1:
        return attention(q, k, v, plan, scale=scale, return_lse=return_lse)
    batch = q.shape[0]
    if parts > MAX_PARTS or k.shape[1] % parts:
        raise ValueError(f"parts is {parts}; use a divisor of {k.shape[1]} keys, at most {MAX_PARTS}")
    for name, x in (("k", k), ("v", v)):
        if not _viewable(x):
            raise ValueError(f"{name} has gaps between its batch items and no view as parts; use parts=1")
    if split is None and plan is not None:
        split = split_plan(plan, parts, batch)
    queries = q.expand(parts, -1, -1, -1) if batch == 1 else q.repeat_interleave(parts, 0)
    keys, values = (x.unflatten(1, (parts, -1)).flatten(0, 1) for x in (k, v))
    outs, lses = attention(queries, keys, values, split, scale=scale, return_lse=True)
    out, lse = merge(*(cast(Tensor, x).unflatten(0, (batch, parts)).unbind(1) for x in (outs, lses)))
    return (out, lse) if return_lse else out


def _viewable(x: Tensor) -> bool:
    """Whether rows follow each other through all batch items, so that any even cut of them is a view."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
