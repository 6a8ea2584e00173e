"""What an executor relies on, checked field by field."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import AttentionPlan


def check_plan(plan: AttentionPlan) -> None:
    """Raise ValueError naming the first field that breaks the contract of AttentionPlan, its value and the remedy."""
    for name in ("batch", "heads", "lq", "lk"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    lengths = plan.segments
    if not isinstance(lengths, tuple) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ValueError(f"segments must be a tuple of positive ints, got {lengths!r}; use with_segments(lengths)")
    _check_tensors(plan)
    _check_tiles(plan)
    _check_runs(plan)
    _check_order("q_order", plan.q_order, plan.lq)
    _check_order("kv_order", plan.kv_order, plan.lk)
    if plan.stand_ins is not None:
        _check_stand_ins(plan)


def _check_stand_ins(plan: AttentionPlan) -> None:
    found = plan.stand_ins
    assert found is not None
    lengths, inner = found.lengths, found.plan
    if inner.stand_ins is not None or (inner.batch, inner.heads, inner.lq) != (plan.batch, plan.heads, plan.lq):
        raise ValueError(
            f"stand_ins.plan has shape {inner.shape}, but the plan has {plan.shape}; give it the same queries"
        )
    check_plan(inner)
    wanted = f"int64 [1 or {plan.batch}, 1 or {plan.heads}, {inner.lk}]"
    if lengths.dtype != torch.int64 or lengths.dim() != 3 or lengths.shape[2] != inner.lk:
        raise ValueError(f"stand_ins.lengths is {lengths.dtype} {tuple(lengths.shape)}; it must be {wanted}")
    if lengths.shape[0] not in (1, plan.batch) or lengths.shape[1] not in (1, plan.heads):
        raise ValueError(f"stand_ins.lengths has shape {tuple(lengths.shape)}; it must be {wanted}")
    if bool((lengths < 0).any()) or bool((lengths.sum(-1) != plan.lk).any()):
        raise ValueError(f"stand_ins.lengths must be at least 0 and sum to the {plan.lk} keys, got {lengths.tolist()}")
    if found.kv_order is not None:
        _check_order("stand_ins.kv_order", found.kv_order, plan.lk)


def _check_tensors(plan: AttentionPlan) -> None:
    count = len(plan.tiles) if isinstance(plan.tiles, Tensor) and plan.tiles.dim() else 0
    shapes: dict[str, tuple[int | None, ...]] = {
        "tiles": (None, 3),
        "run_ptr": (count + 1,),
        "runs": (None, 3),
        "mask_bits": (None,),
    }
    for name, shape in shapes.items():
        value = getattr(plan, name)
        if value is None and name == "mask_bits":
            continue
        _check_one(plan, name, value, shape)
    for name, length in (("q_order", plan.lq), ("kv_order", plan.lk)):
        value = getattr(plan, name)
        if value is None:
            continue
        _check_one(plan, name, value, (None, None, length))
        if value.shape[0] not in (1, plan.batch) or value.shape[1] not in (1, plan.heads):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be [1 or {plan.batch}, 1 or {plan.heads}, {length}]"
            )


def _check_one(plan: AttentionPlan, name: str, value: object, shape: tuple[int | None, ...]) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.int32:
        raise ValueError(f"{name} must be torch.int32, got {value.dtype}; convert it with .to(torch.int32)")
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()}; call .contiguous()")
    if value.device != plan.tiles.device:
        raise ValueError(
            f"{name} is on {value.device} but tiles are on {plan.tiles.device}; move the plan with .to(device)"
        )


def _first(bad: Tensor) -> int | None:
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None


def _check_tiles(plan: AttentionPlan) -> None:
    bh, start, rows = plan.tiles.long().unbind(1)
    groups = plan.batch * plan.heads
    bad = _first((bh < 0) | (bh >= groups))
    if bad is not None:
        raise ValueError(f"tiles[{bad}, 0] is {int(bh[bad])}; a batch-head index must lie in [0, {groups})")
    bad = _first((start < 0) | (rows < 0) | (start + rows > plan.lq))
    if bad is not None:
        raise ValueError(
            f"tiles[{bad}] covers rows {int(start[bad])} + {int(rows[bad])}, outside the {plan.lq} query rows"
        )
    used = rows > 0
    place = (bh * plan.lq + start)[used]
    place, order = place.sort()
    end = place + rows[used][order]
    bad = _first(end[:-1] > place[1:])
    if bad is not None:
        row = int(place[bad + 1])
        raise ValueError(
            f"tiles overlap at batch-head {row // plan.lq}, query row {row % plan.lq}; a row may be in one tile only"
        )


def _check_runs(plan: AttentionPlan) -> None:
    ptr = plan.run_ptr.long()
    if int(ptr[0]) != 0:
        raise ValueError(f"run_ptr[0] is {int(ptr[0])}; it must be 0")
    bad = _first(ptr[1:] < ptr[:-1])
    if bad is not None:
        raise ValueError(f"run_ptr falls from {int(ptr[bad])} to {int(ptr[bad + 1])} at tile {bad}; it must never fall")
    if int(ptr[-1]) > len(plan.runs):
        raise ValueError(
            f"run_ptr[-1] is {int(ptr[-1])} but runs has {len(plan.runs)} rows; runs must hold all of them"
        )

    tile, runs = plan._used_runs()
    start, length, mask = runs.unbind(1)
    bad = _first((start < 0) | (length < 1) | (start + length > plan.lk))
    if bad is not None:
        raise ValueError(
            f"runs[{bad}] covers keys {int(start[bad])} + {int(length[bad])}; a run has at least one key "
            f"and lies in the {plan.lk} keys of the plan"
        )
    same = tile[1:] == tile[:-1]
    gap = start[1:] - (start + length)[:-1]
    bad = _first(same & (gap < 0))
    if bad is not None:
        raise ValueError(
            f"runs[{bad}] and runs[{bad + 1}] of tile {int(tile[bad])} overlap or are not sorted by kv_start"
        )
    bad = _first(same & (gap == 0) & (mask[1:] < 0) & (mask[:-1] < 0))
    if bad is not None:
        raise ValueError(
            f"runs[{bad}] and runs[{bad + 1}] of tile {int(tile[bad])} are full neighbours; merge them into one"
        )
    bad = _first(mask < -1)
    if bad is not None:
        raise ValueError(f"runs[{bad}, 2] is {int(mask[bad])}; it must be -1 (full) or an offset into mask_bits")
    if bool((mask >= 0).any()):
        _check_bits(plan, tile, runs)


def _check_bits(plan: AttentionPlan, tile: Tensor, runs: Tensor) -> None:
    if plan.mask_bits is None:
        raise ValueError("runs have mask offsets but mask_bits is None; pass the packed words or use -1")
    partial = runs[:, 2] >= 0
    tile, (_, length, offset) = tile[partial], runs[partial].unbind(1)
    rows, width = plan.tiles[tile, 2].long(), (length + 31) // 32
    bad = _first(offset + rows * width > len(plan.mask_bits))
    if bad is not None:
        raise ValueError(
            f"a partial run needs mask words {int(offset[bad])} to {int(offset[bad] + rows[bad] * width[bad])}, "
            f"but mask_bits has {len(plan.mask_bits)}"
        )
    ragged = length % 32 > 0
    rows, width, offset, length = rows[ragged], width[ragged], offset[ragged], length[ragged]
    run = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)
    inside = torch.arange(len(run), device=rows.device) - (rows.cumsum(0) - rows)[run]
    last = plan.mask_bits[offset[run] + (inside + 1) * width[run] - 1].long() & 0xFFFFFFFF
    bad = _first(last >> (length[run] % 32) > 0)
    if bad is not None:
        raise ValueError(
            f"mask_bits has bits set past the {int(length[run[bad]])} keys of a partial run; they must be 0"
        )


def _check_order(name: str, order: Tensor | None, length: int) -> None:
    if order is None:
        return
    flat = order.reshape(-1, length).long()
    if bool(((flat < 0) | (flat >= length)).any()):
        wrong = flat[(flat < 0) | (flat >= length)][0]
        raise ValueError(f"{name} holds {int(wrong)}; tokens are numbered 0 to {length - 1}")
    if not is_permutation(flat):
        raise ValueError(f"{name} is not a permutation of 0..{length - 1}: a token appears twice")


def is_permutation(order: Tensor) -> bool:
    """Whether every row of int64 ``[N, L]``, values in range, holds every index once. Synchronises."""
    seen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    return bool(seen.scatter_(1, order, True).all())
