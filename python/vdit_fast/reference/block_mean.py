"""Means of blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def block_mean(
    x: Tensor, lengths: Tensor, order: Tensor | None = None, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``ops.block_mean``; fp64 stays fp64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, tokens, heads, dim = x.shape
    blocks = lengths.shape[-1]
    place = torch.arange(tokens, device=x.device).expand(batch, heads, tokens)
    token = place if order is None else order.long().expand(batch, heads, tokens)
    ends = lengths.long().expand(batch, heads, blocks).cumsum(-1)
    block = torch.searchsorted(ends.contiguous(), place.contiguous(), right=True)  # `blocks`: in none
    if kv_len is not None:
        block = torch.where(token < kv_len.view(-1, 1, 1), block, blocks)
    rows = x.transpose(1, 2).to(dtype).gather(2, token[..., None].expand(-1, -1, -1, dim))
    rows = rows.masked_fill((block == blocks)[..., None], 0)
    total = rows.new_zeros(batch, heads, blocks + 1, dim)
    total.scatter_add_(2, block[..., None].expand(-1, -1, -1, dim), rows)
    count = torch.zeros(batch, heads, blocks + 1, dtype=torch.int32, device=x.device)
    count.scatter_add_(2, block, torch.ones_like(block, dtype=torch.int32))
    total, count = total[:, :, :blocks], count[:, :, :blocks]
    return total / count.clamp(min=1)[..., None], count
