"""Two streams of tokens that lie in one buffer: joined without a copy where they are neighbours in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join"]


def join(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat((first, second), dim=1)`` of [B, N, ...] and [B, M, ...]; a view when both are slices of one buffer.

    Blocks hand their streams on as slices of a joint result, and every concatenation of them would copy it. The view is
    for reading. Compiled graphs and recorded gradients get the copy.
    """
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _neighbours(first, second):
        shape = (first.shape[0], first.shape[1] + second.shape[1], *first.shape[2:])
        return first.as_strided(shape, first.stride(), first.storage_offset())
    return torch.cat((first, second), dim=1)


def _neighbours(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape[0] == second.shape[0]
        and first.shape[2:] == second.shape[2:]
        and first.numel() > 0
        and second.numel() > 0
        and first.stride() == second.stride()
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and second.storage_offset() == first.storage_offset() + first.shape[1] * first.stride(1)
    )
