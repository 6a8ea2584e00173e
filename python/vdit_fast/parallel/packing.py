"""What a message looks like on its way: the one place where a tensor becomes a buffer and a buffer a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Packing", "Plain"]


class Packing(Protocol):
    """How the stream between two stages is sent."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A buffer of one dimension that a message of this shape and dtype comes in."""
        ...

    def pack(self, x: Tensor) -> Tensor:
        """The message: one dimension, contiguous, no memory that will be written to."""
        ...

    def unpack(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor that was packed, up to the packing's own rounding."""
        ...


class Plain:
    """As it is."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.empty(math.prod(shape), dtype=dtype, device=device)

    def pack(self, x: Tensor) -> Tensor:
        return x.contiguous().view(-1)

    def unpack(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return buffer.view(tuple(shape))
