"""Slices of tensors one behind the other for sending, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

E4M3_MAX = 448.0


def _padded(data: Tensor) -> Tensor:
    """Bytes, continued with zeros to a multiple of 16."""
    return torch.nn.functional.pad(data, (0, -data.numel() % 16))


def to_e4m3(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [..., D] as e4m3 codes uint8 [..., D] and a power of two per ``block`` channels, its biased exponent uint8
    [..., ceil(D / block)]. The power is the smallest one, at least 2^-126, with which the largest finite magnitude of
    the block is at most 448. NaN and infinities become NaN."""
    width = x.shape[-1]
    wide = torch.nn.functional.pad(x.double(), (0, -width % block)).unflatten(-1, (-1, block))
    largest = wide.abs().masked_fill(~wide.isfinite(), 0).amax(-1)
    fraction, exponent = torch.frexp(largest)  # largest = fraction * 2^exponent, fraction in [0.5, 1)
    exponent = exponent - 9 + (fraction > 0.875)  # 448 = 0.875 * 2^9
    exponent = exponent.masked_fill(largest == 0, -126).clamp_min(-126)
    scaled = torch.ldexp(wide, -exponent[..., None])
    scaled = scaled.masked_fill(~wide.isfinite(), torch.nan).float()
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)[..., :width]
    codes = codes.where(codes & 0x7F != 0x7F, 0x7F)  # one NaN
    return codes, (exponent + 127).to(torch.uint8)


def from_e4m3(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The values that :func:`to_e4m3` stands for, [..., D] in dtype. They are exact, but for magnitudes beyond the
    largest finite one of dtype, which become that, and fp16 subnormals, which are rounded."""
    power = torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.to(torch.int64) - 127)
    power = power.repeat_interleave(block, -1)[..., : codes.shape[-1]]
    limit = torch.finfo(dtype).max
    return (codes.view(torch.float8_e4m3fn).double() * power).clamp(-limit, limit).to(dtype)


def _per_tensor(tensors: int, sizes: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    if all(isinstance(n, int) for n in sizes):
        return [[int(n) for n in sizes]] * tensors  # type: ignore[arg-type]
    return [list(each) for each in sizes]  # type: ignore[arg-type]


def pack_slices(
    x: Tensor | Sequence[Tensor],
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    dim: int = 1,
    *,
    compression: str | None = None,
    block: int = 128,
) -> Tensor:
    """See ``ops.pack_slices``."""
    many = [x] if isinstance(x, Tensor) else list(x)
    each = [[t.shape[dim]] for t in many] if sizes is None else _per_tensor(len(many), sizes)
    parts = [t.split(n, dim) for t, n in zip(many, each, strict=True)]
    found: list[Tensor] = []
    for of_rank in zip(*parts, strict=True):
        for part in of_rank:
            if compression == "e4m3":
                found += [_padded(data.flatten()) for data in to_e4m3(part, block)]
            else:
                found.append((part.bfloat16() if compression == "bf16" else part).flatten())
    return torch.cat(found)


def unpack_slices(
    buffer: Tensor,
    shapes: Sequence[int] | Sequence[Sequence[int]],
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    dim: int = 1,
    *,
    compression: str | None = None,
    block: int = 128,
    dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    """See ``ops.unpack_slices``."""
    one = all(isinstance(n, int) for n in shapes)
    many = [[int(n) for n in shapes]] if one else [list(s) for s in shapes]  # type: ignore[arg-type]
    each = [[s[dim]] for s in many] if sizes is None else _per_tensor(len(many), sizes)
    out_dtype = dtype or buffer.dtype
    at = 0

    def take(shape: list[int], pad: bool) -> Tensor:
        nonlocal at
        count = torch.Size(shape).numel()
        data = buffer[at : at + count].view(shape)
        at += count + (-count % 16 if pad else 0)
        return data

    found: list[list[Tensor]] = [[] for _ in many]
    for rank in range(len(each[0])):
        for parts, shape, counts in zip(found, many, each, strict=True):
            here = [*shape[:dim], counts[rank], *shape[dim + 1 :]]
            if compression == "e4m3":
                codes = take(here, pad=True)
                scales = take([*here[:-1], -(-here[-1] // block)], pad=True)
                parts.append(from_e4m3(codes, scales, block, out_dtype))
            else:
                parts.append(take(here, pad=False).to(out_dtype))
    whole = [torch.cat(parts, dim) for parts in found]
    return whole[0] if one else whole
