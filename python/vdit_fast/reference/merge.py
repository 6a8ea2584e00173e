"""Merging of partial attention results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the results over each set.

    Args:
        outs: ``[B, L, H, D]`` each, one dtype.
        lses: ``[B, H, L]`` each, natural log-sum-exp; -inf where a set held no key.

    Returns:
        (out in the inputs' dtype, lse fp32 or fp64). Rows that are empty in every part give 0 and -inf.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge needs as many lses as outs and at least one, got {len(outs)} outs and {len(lses)} lses"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        batch, length, heads, _ = out.shape
        if out.shape != outs[0].shape or lse.shape != (batch, heads, length):
            raise ValueError(
                f"outs[{i}] is {list(out.shape)} and lses[{i}] {list(lse.shape)}; expected {list(outs[0].shape)} and "
                f"{[batch, heads, length]}"
            )
    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in lses])  # [parts, B, H, L]
    lse = torch.logsumexp(stacked, 0)
    weights = (stacked - lse.masked_fill(lse == -torch.inf, 0)).exp().transpose(2, 3).unsqueeze(-1)
    # an empty part has weight 0 and may hold anything
    parts = torch.stack([out.to(dtype) for out in outs]).masked_fill(weights == 0, 0)
    return (weights * parts).sum(0).to(outs[0].dtype), lse
