"""What ranks send each other: slices of tensors one behind the other in one buffer, compressed or not, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._no_gradient import refuse_tangents

Compression = Literal["bf16", "e4m3"]
Sizes = Sequence[int] | Sequence[Sequence[int]]

_FORMATS: dict[Compression | None, int] = {None: 0, "bf16": 1, "e4m3": 2}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def pack_slices(
    x: Tensor | Sequence[Tensor],
    sizes: Sizes | None = None,
    dim: int = 1,
    *,
    compression: Compression | None = None,
    block: int = 128,
) -> Tensor:
    """Cut tensors along one dimension and lay the slices one behind the other: the first slice of every tensor, then
    the second of every tensor, and so on. One launch, one pass over the data. With a slice per rank this is the
    send buffer of an all-to-all (q, k and v in one message per rank; heads, or rows, in groups of any sizes); with one
    slice it is the message of a pipeline stage.

    Differentiable without compression: it is a permutation, and the gradient is :func:`unpack_slices`.

    Args:
        x: ``[B, N, C]`` or ``[B, N, H, D]``, any strides; or up to four such tensors of one dtype, which have the same
            number of slices. Any dtype; float32, bfloat16 or float16 with compression.
        sizes: lengths of the slices along dim, at most 64, 0 allowed, adding up to the dimension; a list per tensor
            where they differ (grouped heads). None: one slice.
        dim: 1 (rows), or 2 (heads of ``[B, N, H, D]``).
        compression: None: as it is. ``"bf16"``: rounded to nearest even. ``"e4m3"``: a byte per number and a power of
            two per ``block`` numbers of the last dimension (e8m0, the smallest one with which the largest finite
            magnitude m is at most 448). The error of a number is at most ``max(2^-4 |x|, 2^-10 m / 224, 2^-136)``, so
            never more than 2^-4 of the largest in its block; zeros keep their sign, numbers that are e4m3 times that
            power are exact, NaN stays NaN, infinities become NaN. The same bits on every device.
        block: 32, 64 or 128: numbers that share a scale; the last of a row may be fewer. With ``"e4m3"`` only.

    Returns:
        One dimension: the tensors' dtype, bfloat16 for ``"bf16"``, uint8 for ``"e4m3"``, where every slice of a tensor
        has its codes, then its scales, each continued with zeros to 16 bytes. :func:`packed_sizes` are the lengths.

    Raises:
        RuntimeError: shapes, sizes, dtypes or devices do not fit, or a gradient is required with compression.
    """
    many = [x] if isinstance(x, Tensor) else list(x)
    refuse_tangents("pack_slices", *many)
    shapes = [list(t.shape) for t in many]
    flat = _flat_sizes("pack_slices", shapes, sizes, dim)
    packed: Tensor = torch.ops.vdit_fast.pack_slices(many, flat, dim, _format("pack_slices", compression), block)
    return packed


@overload
def unpack_slices(
    buffer: Tensor,
    shapes: Sequence[int],
    sizes: Sizes | None = None,
    dim: int = 1,
    *,
    compression: Compression | None = None,
    block: int = 128,
    dtype: torch.dtype | None = None,
) -> Tensor: ...
@overload
def unpack_slices(
    buffer: Tensor,
    shapes: Sequence[Sequence[int]],
    sizes: Sizes | None = None,
    dim: int = 1,
    *,
    compression: Compression | None = None,
    block: int = 128,
    dtype: torch.dtype | None = None,
) -> list[Tensor]: ...
def unpack_slices(
    buffer: Tensor,
    shapes: Sequence[int] | Sequence[Sequence[int]],
    sizes: Sizes | None = None,
    dim: int = 1,
    *,
    compression: Compression | None = None,
    block: int = 128,
    dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    """The tensors that :func:`pack_slices` with the same arguments packed; after an all-to-all, those that the slices
    of all ranks make up. One launch. Differentiable in buffer without compression.

    Args:
        buffer: contiguous, one dimension, of :func:`packed_sizes` elements in all.
        shapes: of the whole tensors, e.g. ``[B, N, H, D]``; one shape, or up to four.
        sizes, dim, compression, block: as for :func:`pack_slices`.
        dtype: of the result, with compression: float32, bfloat16 or float16. Magnitudes beyond its largest finite one
            become that (``"e4m3"``) or infinite (``"bf16"``).

    Returns:
        Contiguous tensors: one for one shape, otherwise a list.

    Raises:
        RuntimeError: shapes, sizes, dtypes or the length do not fit, or a gradient is required with compression.
    """
    one = all(isinstance(n, int) for n in shapes)
    many: list[list[int]] = [list(shapes)] if one else [list(s) for s in shapes]  # type: ignore[arg-type]
    refuse_tangents("unpack_slices", buffer)
    if compression is None:
        if dtype not in (None, buffer.dtype):
            raise RuntimeError(
                f"vdit_fast: unpack_slices: dtype is {dtype}, but without compression it is the buffer's"
            )
        code = 0
    else:
        if dtype not in _DTYPES:
            raise RuntimeError(
                f"vdit_fast: unpack_slices: dtype is {dtype}; with compression pass float32, bfloat16 or float16"
            )
        code = _DTYPES[dtype]
    flat = _flat_sizes("unpack_slices", many, sizes, dim)
    whole: list[Tensor] = torch.ops.vdit_fast.unpack_slices(
        buffer, [n for s in many for n in _wide(s)], flat, dim, _format("unpack_slices", compression), block, code
    )
    whole = [t.view(s) for t, s in zip(whole, many, strict=True)]
    return whole[0] if one else whole


def packed_sizes(
    shapes: Sequence[int] | Sequence[Sequence[int]],
    sizes: Sizes | None = None,
    dim: int = 1,
    *,
    compression: Compression | None = None,
    block: int = 128,
) -> list[int]:
    """Elements of the buffer of :func:`pack_slices` that belong to each slice: the split sizes of an all-to-all. They
    are bytes for ``"e4m3"``."""
    one = all(isinstance(n, int) for n in shapes)
    many: list[list[int]] = [list(shapes)] if one else [list(s) for s in shapes]  # type: ignore[arg-type]
    flat = _flat_sizes("packed_sizes", many, sizes, dim)
    slices = len(flat) // len(many)
    code = _format("packed_sizes", compression)

    def length(tensor: int, rank: int) -> int:
        shape = many[tensor][:]
        shape[dim] = flat[tensor * slices + rank]
        count = math.prod(shape)
        if code < 2:
            return count
        scales = math.prod(shape[:-1]) * -(-shape[-1] // block)
        return -(-count // 16) * 16 + -(-scales // 16) * 16

    return [sum(length(t, rank) for t in range(len(many))) for rank in range(slices)]


def _format(who: str, compression: Compression | None) -> int:
    if compression not in _FORMATS:
        raise RuntimeError(f'vdit_fast: {who}: compression is {compression!r}; expected None, "bf16" or "e4m3"')
    return _FORMATS[compression]


def _wide(shape: Sequence[int]) -> list[int]:
    """[B, N, C] as [B, N, 1, C]."""
    return [*shape[:-1], 1, shape[-1]] if len(shape) == 3 else list(shape)


def _flat_sizes(who: str, shapes: list[list[int]], sizes: Sizes | None, dim: int) -> list[int]:
    """The sizes of every tensor one behind the other."""
    if not shapes or any(len(s) not in (3, 4) for s in shapes):
        raise RuntimeError(f"vdit_fast: {who}: shapes are {shapes}; pass tensors [B, N, C] or [B, N, H, D]")
    if dim not in (1, 2) or (dim == 2 and any(len(s) == 3 for s in shapes)):
        raise RuntimeError(f"vdit_fast: {who}: dim is {dim}; expected 1, or 2 for tensors [B, N, H, D]")
    if sizes is None:
        return [s[dim] for s in shapes]
    nested: list[Any] = list(sizes)
    each = [nested] * len(shapes) if all(isinstance(n, int) for n in nested) else [list(n) for n in nested]
    if len(each) != len(shapes) or not each[0] or any(len(n) != len(each[0]) for n in each):
        raise RuntimeError(
            f"vdit_fast: {who}: sizes are {nested}; expected one list, or one of equal length per tensor"
        )
    for one, shape in zip(each, shapes, strict=True):
        if min(one) < 0 or sum(one) != shape[dim]:
            raise RuntimeError(
                f"vdit_fast: {who}: sizes {one} do not add up to {shape[dim]}, dimension {dim} of a tensor {shape}"
            )
    return [n for one in each for n in one]


@torch.library.register_fake("vdit_fast::pack_slices")
def _fake_pack(x: list[Tensor], sizes: list[int], dim: int, compression: int, block: int) -> Tensor:
    count = len(sizes) // len(x)
    each = [sizes[t * count : (t + 1) * count] for t in range(len(x))]
    name = next(n for n, code in _FORMATS.items() if code == compression)
    lengths = packed_sizes([t.shape for t in x], each, dim, compression=name, block=block)
    dtype = (x[0].dtype, torch.bfloat16, torch.uint8)[compression]
    return x[0].new_empty([sum(lengths)], dtype=dtype)


@torch.library.register_fake("vdit_fast::unpack_slices")
def _fake_unpack(
    buffer: Tensor, shapes: list[int], sizes: list[int], dim: int, compression: int, block: int, dtype: int
) -> list[Tensor]:
    out = buffer.dtype if compression == 0 else next(d for d, code in _DTYPES.items() if code == dtype)
    return [buffer.new_empty(shapes[i : i + 4], dtype=out) for i in range(0, len(shapes), 4)]


def _refuse_compression(name: str, compression: int) -> None:
    if compression != 0:
        raise RuntimeError(
            f"vdit_fast: {name} has no gradient with compression; call it under torch.no_grad(), or without compression"
        )


def _setup_pack(ctx: Any, inputs: tuple[list[Tensor], list[int], int, int, int], output: Tensor) -> None:
    x, ctx.sizes, ctx.dim, compression, ctx.block = inputs
    _refuse_compression("pack_slices", compression)
    ctx.shapes = [t.shape for t in x]


def _pack_back(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None, None, None]:
    flat = [n for s in ctx.shapes for n in _wide(s)]
    grads = torch.ops.vdit_fast.unpack_slices(grad.contiguous(), flat, ctx.sizes, ctx.dim, 0, ctx.block, 0)
    return [g.view(s) for g, s in zip(grads, ctx.shapes, strict=True)], None, None, None, None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    buffer, shapes, ctx.sizes, ctx.dim, compression, ctx.block, _ = inputs
    _refuse_compression("unpack_slices", compression)
    ctx.shapes = [shapes[i : i + 4] for i in range(0, len(shapes), 4)]
    ctx.save_for_backward(buffer.new_empty(0))  # what gradients that nobody computed are made like


def _unpack_back(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    (like,) = ctx.saved_tensors
    whole = [like.new_zeros(s) if g is None else g for g, s in zip(grads, ctx.shapes, strict=True)]
    packed = torch.ops.vdit_fast.pack_slices(whole, ctx.sizes, ctx.dim, 0, ctx.block)
    return packed, None, None, None, None, None, None


torch.library.register_autograd("vdit_fast::pack_slices", _pack_back, setup_context=_setup_pack)
torch.library.register_autograd("vdit_fast::unpack_slices", _unpack_back, setup_context=_setup_unpack)
