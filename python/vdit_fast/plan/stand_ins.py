"""Stand-ins: one mean key and mean value for every key block that a query does not read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import AttentionPlan

NEVER = -1e4
"""Logarithmic weight of a stand-in without tokens: exp of it is 0 in fp32, and it fits into 16 bits."""


@dataclass(frozen=True, eq=False)
class StandIns:
    """The blocks of a plan's keys, and which queries read a block's mean instead of its tokens.

    A block of n tokens becomes one key, the mean of its keys, and one value, the mean of its values. Its weight in the
    softmax is that of n tokens with this key: log n is added to its score. That is exact when all keys of the block are
    equal, and the error is of second order in their spread (the parameter-free compensation of SVG-EAR, arXiv
    2603.08982).

    Attributes:
        plan: who reads which stand-in, of shape (batch, heads, lq, blocks).
        lengths: int64 ``[1|batch, 1|heads, blocks]``, tokens of each block, in the order of ``kv_order``; 0 allowed.
        kv_order: int32 ``[1|batch, 1|heads, lk]`` or None; blocks are stretches of the permuted keys.
    """

    plan: AttentionPlan
    lengths: Tensor
    kv_order: Tensor | None = None

    def to(self, device: torch.device | str) -> StandIns:
        """The same blocks with their tensors on ``device``."""
        order = None if self.kv_order is None else self.kv_order.to(device)
        return replace(self, plan=self.plan.to(device), lengths=self.lengths.to(device), kv_order=order)

    def means(self, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean keys, mean values and their logarithmic weights; differentiable in k and v.

        Args:
            k, v: ``[B, lk, Hkv, D]``, any strides, a floating dtype.
            kv_len: integer ``[B]`` or None; tokens of original index at or above it belong to no block.
        Returns:
            k, v ``[B, blocks, Hkv, D]`` (``[B, blocks, heads, D]`` where blocks differ from head to head) and the
            natural logarithm of the number of tokens ``[B, Hkv or heads, blocks]``, ``NEVER`` for 0. fp32, or fp64.
        """
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        own = self.lengths.shape[1] > 1 or (self.kv_order is not None and self.kv_order.shape[1] > 1)
        heads = self.plan.heads if own else k.shape[2]
        batch, blocks = k.shape[0], self.lengths.shape[-1]
        lengths = self.lengths.expand(batch, heads, blocks).reshape(-1)
        rows: Tensor | None = None
        if self.kv_order is not None:
            rows = self.kv_order.long().expand(batch, heads, -1)[..., None]

        def sums(x: Tensor) -> Tensor:
            """[B, heads, lk, n] in original order → [B, heads, blocks, n]."""
            if rows is not None:
                x = x.gather(2, rows.expand(-1, -1, -1, x.shape[-1]))
            flat = torch.segment_reduce(
                x.flatten(0, 2).contiguous(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0
            )  # checking would wait for the GPU
            return flat.view(batch, heads, blocks, x.shape[-1])

        valid: Tensor | None = None
        count = lengths.view(batch, heads, blocks).to(dtype)
        if kv_len is not None:
            valid = torch.arange(k.shape[1], device=k.device) < kv_len.view(-1, 1, 1).to(k.device)
            valid = valid.expand(batch, heads, -1)[..., None]
            count = sums(valid.to(dtype)).squeeze(-1)
        found = []
        for x in (k, v):
            x = x.to(dtype).transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)
            if valid is not None:
                x = x.masked_fill(~valid, 0)
            found.append((sums(x) / count.clamp(min=1)[..., None]).transpose(1, 2))
        return found[0], found[1], count.log().clamp(min=NEVER)
