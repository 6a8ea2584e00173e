"""What a message looks like on its way: the one place where a tensor becomes a buffer and a buffer a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vdit_fast.ops.pack import Compression, pack_slices, packed_sizes, unpack_slices

__all__ = ["Compressed", "Packing", "Plain"]


class Packing(Protocol):
    """How the stream between two stages is sent. A ``description`` (str), where it has settings, tells two of a class
    apart: all ranks must have the same."""

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
    """As it is.

    On a GPU a copy: a compiled model's output may be memory of a CUDA graph, which the next pass overwrites while the
    message is under way.
    """

    description = "as it is"

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        return torch.empty(math.prod(shape), dtype=dtype, device=device)

    def pack(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1)
        return flat.clone() if flat.is_cuda and x.is_contiguous() else flat

    def unpack(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return buffer.view(tuple(shape))


class Compressed:
    """Rounded on the way: ``"bf16"``, or ``"e4m3"`` with a power of two per ``block`` channels, a byte per value and
    within 2^-4 of the largest value of its block (``ops.pack_slices`` has the exact bound).

    Raises:
        RuntimeError: an unknown compression, or a block other than 32, 64 and 128.
    """

    def __init__(self, compression: Compression, block: int = 128) -> None:
        if compression not in ("bf16", "e4m3") or block not in (32, 64, 128):
            raise RuntimeError(
                f'vdit_fast: compression {compression!r}, block {block}; expected "bf16" or "e4m3", and 32, 64 or 128'
            )
        self.compression, self.block = compression, block
        self.description = f"{compression}, block {block}"

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        (count,) = packed_sizes(shape, compression=self.compression, block=self.block)
        kind = torch.uint8 if self.compression == "e4m3" else torch.bfloat16
        return torch.empty(count, dtype=kind, device=device)

    def pack(self, x: Tensor) -> Tensor:
        return pack_slices(x.contiguous(), compression=self.compression, block=self.block)

    def unpack(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return unpack_slices(buffer, tuple(shape), compression=self.compression, block=self.block, dtype=dtype)
