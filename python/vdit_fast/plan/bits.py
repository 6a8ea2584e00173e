"""Packing of boolean blocks into 32-bit words, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from .runs import exclusive_starts


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int32 word: ``[W]`` int32 to ``[W]`` int64."""
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64, device=words.device)
    return table[words.contiguous().view(torch.uint8).long()].view(-1, 4).sum(1)


def pack_columns(mask: Tensor, kv_len: list[int]) -> Tensor:
    """Pack rows of a mask, each key block on word boundaries.

    ``mask`` bool ``[G, lq, lk]`` and block lengths that sum to lk give int32 ``[G, lq, sum(ceil(n / 32))]``.
    """
    g, lq, _ = mask.shape
    # All blocks but the last have the same length (the caller's block size), so two pads are enough.
    size, tail = kv_len[0], kv_len[-1]
    parts = []
    for piece, block in ((mask[..., : sum(kv_len[:-1])], size), (mask[..., sum(kv_len[:-1]) :], tail)):
        if piece.shape[-1] == 0:
            continue
        cells = piece.reshape(g, lq, -1, block)
        cells = torch.nn.functional.pad(cells.view(torch.uint8), (0, -block % 32)).reshape(g, lq, -1, 8)
        byte = cells[..., 0].clone()
        for bit in range(1, 8):
            byte |= cells[..., bit] << bit
        parts.append(byte.view(torch.int32))
    return torch.cat(parts, dim=-1)


def block_words(mask: Tensor, rows: Tensor, cols: Tensor, kv_len: list[int]) -> tuple[Tensor, Tensor]:
    """Words of every block of ``mask`` bool ``[G, lq, lk]``, block after block.

    ``rows`` and ``cols`` are the int64 block lengths on the mask's device, ``kv_len`` the latter on the host.

    Returns (words int32 ``[G * lq * sum(ceil(n / 32))]``, offset of each block int64 ``[G, nq, nk]``).
    """
    device = mask.device
    g, lq, _ = mask.shape
    width = (cols + 31) // 32
    total = sum((n + 31) // 32 for n in kv_len)
    q_start, w_start = exclusive_starts(rows), exclusive_starts(width)
    offsets = q_start[:, None] * total + rows[:, None] * w_start[None, :]
    offsets = offsets[None] + (torch.arange(g, device=device) * (lq * total))[:, None, None]
    # destination of the word in row r and column c of the packed mask
    block_q = torch.repeat_interleave(torch.arange(len(rows), device=device), rows, output_size=lq)
    block_k = torch.repeat_interleave(torch.arange(len(cols), device=device), width, output_size=total)
    row_in = torch.arange(lq, device=device) - q_start[block_q]
    word_in = torch.arange(total, device=device) - w_start[block_k]
    place = offsets[0][block_q[:, None], block_k[None, :]] + row_in[:, None] * width[block_k] + word_in
    packed = pack_columns(mask, kv_len).reshape(g, lq * total)
    words = torch.empty_like(packed)
    words[:, place.reshape(-1)] = packed
    return words.reshape(-1), offsets


def trim_words(
    words: Tensor, offsets: Tensor, partial: Tensor, q_len: list[int], kv_len: list[int]
) -> tuple[Tensor, Tensor]:
    """Keep the words of partial blocks only, equal bit patterns once (CPU). Returns new (words, offsets)."""
    rows, width = torch.tensor(q_len), (torch.tensor(kv_len) + 31) // 32
    new = torch.full_like(offsets, -1)
    kept: list[Tensor] = []
    used = 0
    generator = torch.Generator().manual_seed(0)
    # Blocks of one shape (rows, words per row): at most four shapes, whole blocks and the tails.
    shapes = {(m, (n + 31) // 32) for m in set(q_len) for n in set(kv_len)}
    for m, w in sorted(shapes):
        cells = (partial & (rows == m)[:, None] & (width == w)[None, :]).reshape(-1).nonzero().squeeze(1)
        if len(cells) == 0:
            continue
        patterns = words[offsets.reshape(-1)[cells][:, None] + torch.arange(m * w)]
        weights = torch.randint(-(2**62), 2**62, (m * w,), generator=generator)
        _, group = torch.unique((patterns.long() * weights).sum(1), return_inverse=True)
        first = torch.full((int(group.max()) + 1,), len(cells))
        first.scatter_reduce_(0, group, torch.arange(len(cells)), "amin")
        if not torch.equal(patterns[first][group], patterns):  # two patterns with one hash: keep all of them apart
            group = first = torch.arange(len(cells))
        new.view(-1)[cells] = used + group * (m * w)
        kept.append(patterns[first].reshape(-1))
        used += len(first) * m * w
    return (torch.cat(kept) if kept else words[:0]), new


def unpack_rows(words: Tensor, length: int) -> Tensor:
    """``[P, ceil(length / 32)]`` int32 to bool ``[P, length]``, byte by byte: no buffer is larger than the result."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    cells = words.contiguous().view(torch.uint8)[..., None] >> shifts
    return cells.bitwise_and_(1).view(torch.bool).reshape(words.shape[0], -1)[:, :length]
