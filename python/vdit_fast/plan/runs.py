"""The core every builder uses: a boolean block map becomes tiles, merged key runs and their CSR index.

It is a compiled operator; its twin here is a fixed number of whole-tensor operations, and serves maps with bit masks.
On a CPU the buffers have exactly the needed length. Elsewhere the lengths depend on shapes only (capacity), so that
nothing has to be read back by the host: entries are placed by prefix sums, tiles in excess get ``q_len`` 0 and runs in
excess lie beyond ``run_ptr[-1]``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..ops.compile_blocks import compile_blocks as compiled

INT32_MAX = 2**31 - 1


def exclusive_starts(lengths: Tensor) -> Tensor:
    """Start of each block: ``[..., n]`` int64 lengths to ``[..., n]`` int64 exclusive prefix sums."""
    return lengths.cumsum(-1) - lengths


def bridge_empty_blocks(keep: Tensor, kv_len: Tensor) -> Tensor:
    """Give every empty key block the value of the last non-empty block before it (False if there is none).

    An empty block holds no key, so its own value means nothing, but it must not cut a run of neighbours in two.
    ``keep`` is bool ``[G, nq, nk]``, ``kv_len`` int64 ``[1|G, nk]``.
    """
    g, nq, nk = keep.shape
    index = torch.arange(nk, device=keep.device).expand(kv_len.shape)
    last = torch.where(kv_len > 0, index, torch.full_like(index, -1)).cummax(-1).values
    bridged = keep.gather(2, last.clamp(min=0)[:, None, :].expand(g, nq, nk))
    return bridged & (last >= 0)[:, None, :]


def split_blocks(
    q_start: Tensor, q_len: Tensor, q_tile: int | None, lq: int, trim: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut query blocks ``[G, nq]`` into tiles of at most ``q_tile`` rows (None: one tile per block).

    Returns (source block, start, length), each int64 ``[T]``; the source block is an index into the flattened ``[G *
    nq]``.
    """
    g, nq = q_len.shape
    start, length = q_start.reshape(-1), q_len.reshape(-1)
    if q_tile is None:
        return torch.arange(g * nq, device=q_len.device), start, length
    pieces = (length + (q_tile - 1)) // q_tile
    ends = pieces.cumsum(0)
    count = int(ends[-1]) if trim else g * (nq + lq // q_tile)
    tile = torch.arange(count, device=q_len.device)
    source = torch.searchsorted(ends, tile, right=True).clamp(max=g * nq - 1)
    offset = (tile - (ends - pieces)[source]) * q_tile
    rows = (length[source] - offset).clamp(0, q_tile)
    return source, torch.where(rows > 0, start[source] + offset, torch.zeros_like(rows)), rows


def compile_blocks(
    keep: Tensor,
    q_len: Tensor,
    kv_len: Tensor,
    *,
    lq: int,
    q_tile: int | None = None,
    partial: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a block map into ``(tiles, run_ptr, runs)`` of an AttentionPlan.

    By the compiled operator, or where blocks are read through bits by its twin below, which has the arguments.
    """
    if partial is None:
        return compiled(keep, q_len, kv_len, lq, q_tile)
    return compile_blocks_reference(keep, q_len, kv_len, lq=lq, q_tile=q_tile, partial=partial, offsets=offsets)


def compile_blocks_reference(
    keep: Tensor,
    q_len: Tensor,
    kv_len: Tensor,
    *,
    lq: int,
    q_tile: int | None = None,
    partial: Tensor | None = None,
    offsets: Tensor | None = None,
    trim: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``compile_blocks`` in whole-tensor operations.

    Args:
        keep: bool ``[G, nq, nk]``, G = batch * heads: the query block reads all of the key block.
        q_len, kv_len: int64 ``[1|G, nq]`` and ``[1|G, nk]``, block lengths along each axis, zero allowed.
        lq: number of query rows; only the capacity depends on it.
        q_tile: cut query blocks into tiles of at most this many rows; None keeps blocks whole.
        partial, offsets: bool and int64 ``[G, nq, nk]``: blocks that are read through bits, and where their words
            begin. ``partial`` and ``keep`` are disjoint. ``q_tile`` must be None with them (bits are laid out per
            block).
        trim: exact buffer lengths (needs values on the host); default: on a CPU only.
    """
    trim = keep.device.type == "cpu" if trim is None else trim
    g, nq, nk = keep.shape
    device = keep.device
    if not trim or bool((kv_len == 0).any()):
        keep = bridge_empty_blocks(keep, kv_len)
    kv_start = exclusive_starts(kv_len)
    q_len = q_len.expand(g, nq)

    visited = keep if partial is None else keep | partial
    # Key counts stay below 2**24 for every sequence that fits: float32 sums of them are exact (and only order tiles).
    reads = _keys_read(visited, kv_len)
    source, start, rows = split_blocks(exclusive_starts(q_len), q_len, q_tile, lq, trim)
    # unused capacity goes last, behind tiles that read nothing
    work = torch.where(rows > 0, reads[source] * rows, torch.full_like(rows, -1))
    order = torch.argsort(work, descending=True, stable=True)
    if trim:
        order = order[rows[order] > 0]
    source, start, rows = source[order], start[order], rows[order]
    group = source // nq
    tiles = torch.stack((group, start, rows), dim=1).to(torch.int32).contiguous()

    full = keep.reshape(g * nq, nk)[source]
    if not trim:
        full &= (rows > 0)[:, None]
    starts, ends = full.clone(), full.clone()
    starts[:, 1:] &= ~full[:, :-1]
    ends[:, :-1] &= ~full[:, 1:]
    bits = None
    if partial is not None and offsets is not None:
        bits = partial.reshape(g * nq, nk)[source]
        if not trim:
            bits &= (rows > 0)[:, None]
        starts |= bits
        ends |= bits

    per_row = nk if partial is not None else (nk + 1) // 2
    groups = group if kv_len.shape[0] > 1 else torch.zeros_like(group)
    kv_end = (kv_start + kv_len).to(torch.int32)
    kv_start = kv_start.to(torch.int32)
    if trim:
        # numpy finds set flags several times faster than torch does
        first, last = (torch.from_numpy(np.flatnonzero(flags.numpy())) for flags in (starts, ends))
        row_begin = torch.arange(len(source) + 1) * nk
        run_ptr = torch.searchsorted(first, row_begin)
        counts = run_ptr[1:] - run_ptr[:-1]
        runs = torch.empty(len(first), 3, dtype=torch.int32)
        to_block = torch.repeat_interleave(groups * nk - row_begin[:-1], counts, output_size=len(first))
        begin = kv_start.reshape(-1)[to_block + first]
        runs[:, 0] = begin
        runs[:, 1] = kv_end.reshape(-1)[to_block.add_(last)].sub_(begin)
        runs[:, 2] = -1
        if bits is not None and offsets is not None:
            to_cell = torch.repeat_interleave(source * nk - row_begin[:-1], counts, output_size=len(first))
            words = offsets.reshape(-1)[to_cell + first].to(torch.int32)
            runs[:, 2] = torch.where(bits.reshape(-1)[first], words, runs[:, 2])
        _check_capacity(len(first))
        return tiles, run_ptr.to(torch.int32), runs

    capacity = len(source) * per_row
    _check_capacity(capacity)
    run_ptr = torch.zeros(len(source) + 1, dtype=torch.int64, device=device)
    torch.cumsum(starts.sum(1), 0, out=run_ptr[1:])

    def place(flags: Tensor, values: Tensor) -> Tensor:
        # Entry k of the result is the value at the k-th set flag; unset flags write to a spare slot at the end.
        slot = torch.cumsum(flags.reshape(-1), 0) - 1
        slot.masked_fill_(~flags.reshape(-1), capacity)
        out = torch.zeros(capacity + 1, dtype=torch.int32, device=device)
        return out.scatter_(0, slot, values.to(torch.int32).expand(len(source), nk).reshape(-1))[:capacity]

    begin = place(starts, kv_start[groups])
    length = place(ends, kv_end[groups]) - begin
    mask = torch.full_like(begin, -1)
    if bits is not None and offsets is not None:
        words = offsets.reshape(g * nq, nk)[source]
        mask = place(starts, torch.where(bits, words, torch.full_like(words, -1)))
    return tiles, run_ptr.to(torch.int32), torch.stack((begin, length, mask), dim=1)


def _keys_read(keep: Tensor, kv_len: Tensor) -> Tensor:
    """Keys read by every query block: int64 ``[G * nq]``. Head by head on a CPU, to keep the float copy in cache."""
    weight = kv_len.float().unsqueeze(-1)
    if keep.device.type != "cpu":
        return (keep.float() @ weight).reshape(-1).long()
    return torch.cat([keep[i].float() @ weight[i % len(weight)] for i in range(len(keep))]).reshape(-1).long()


def _check_capacity(count: int) -> None:
    if count > INT32_MAX:
        raise ValueError(
            f"the plan needs {count} key runs, more than int32 can index; use larger blocks or fewer heads"
        )
