"""Slices packed and unpacked by the CUDA kernels of csrc/kernels/pack, emulated."""

from __future__ import annotations

import pytest
import torch
from emulator_pack import _params, _run, pack_slices, unpack_slices
from torch import Tensor

from emulator import EAGER_SKEW, LAZY_FORWARD, LAZY_REVERSE, RANDOMS, EmulatorError
from vdit_fast import reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FOUR = (LAZY_FORWARD, LAZY_REVERSE, EAGER_SKEW, RANDOMS[0])
Shape = tuple[int, int, int, int]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-100, 100, shape).to(dtype) if not dtype.is_floating_point else torch.randn(shape).to(dtype)


def strided(shape: Shape, dtype: torch.dtype, kind: str) -> Tensor:
    b, n, h, d = shape
    if kind == "heads first":
        return values((b, h, n, d), dtype).transpose(1, 2)
    if kind == "one of three":
        return values((b, n, 3, h, d), dtype)[:, :, 1]
    if kind == "channels apart":
        return values((b, n, d, h), dtype).transpose(2, 3)
    if kind == "odd heads":
        return values((b, n, h, d + 1), dtype)[..., :d]
    if kind == "odd rows":
        return values((b, n, h * d + 1), dtype)[..., : h * d].unflatten(2, (h, d))
    if kind == "odd batch":
        flat = values((b, n * h * d + 1), dtype)
        return flat[:, : n * h * d].view(b, n, h, d) if b == 1 else flat.as_strided(shape, (flat.shape[1], h * d, d, 1))
    if kind == "odd start":
        return values((b, n, h, d + 8), dtype)[..., 1 : 1 + d]
    return values(shape, dtype)


MOVES = [
    ((2, 9, 5, 64), BF16, "heads first", [2, 0, 2, 1], 2),
    ((2, 37, 3, 16), F32, "contiguous", [20, 1, 16], 1),
    ((1, 150, 4, 64), F32, "one of three", [1, 149], 1),  # several CTAs
    ((2, 7, 3, 20), F16, "odd heads", [1, 2], 2),
    ((3, 5, 2, 24), BF16, "odd rows", [2, 3], 1),
    ((3, 5, 2, 24), BF16, "odd batch", [1, 1], 2),
    ((2, 6, 2, 24), F16, "odd start", [4, 2], 1),
    ((1, 5, 2, 24), BF16, "odd rows", [2, 3], 1),
    ((1, 1, 3, 24), F16, "odd heads", [2, 1], 2),
    ((2, 5, 3, 12), F16, "contiguous", [3, 2], 1),  # pieces of 8 bytes
    ((2, 11, 3, 13), torch.uint8, "contiguous", [1, 1, 1], 2),
    ((2, 4, 3, 6), torch.int64, "channels apart", [2, 1], 2),
    ((1, 4, 2, 5), torch.complex128, "channels apart", [3, 1], 1),
    ((2, 4, 3, 6), torch.int16, "channels apart", [4], 1),
]


def one(total: int, sizes: list[int]) -> list[int]:
    """The same number of slices of another dimension."""
    return [total, *[0] * (len(sizes) - 1)]


@pytest.mark.parametrize(("shape", "dtype", "kind", "sizes", "dim"), MOVES, ids=str)
def test_moves(shape: Shape, dtype: torch.dtype, kind: str, sizes: list[int], dim: int) -> None:
    torch.manual_seed(len(kind))
    other = (shape[0], shape[1] + 1, shape[2] + 2, shape[3])
    x = [strided(shape, dtype, kind), values(other, dtype), strided(shape, dtype, kind)]
    each = [sizes, one(other[dim], sizes), sizes]
    want = reference.pack_slices(x, each, dim)
    for policy in FOUR:
        got = pack_slices(x, each, dim, policy=policy)
        assert torch.equal(got, want), str(policy)
        back = unpack_slices(want, [t.shape for t in x], each, dim, policy=policy)
        assert all(torch.equal(a, b) for a, b in zip(back, x, strict=True)), str(policy)


def test_a_buffer_that_is_not_aligned() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 2, 16)
    buffer = torch.cat([torch.zeros(1), reference.pack_slices(x, [3, 2])])[1:]
    assert torch.equal(unpack_slices(buffer, [x.shape], [[3, 2]])[0], x)


COMPRESSIONS = [
    ((2, 9, 3, 128), BF16, "heads first", [1, 0, 2], 2),
    ((1, 33, 2, 64), F32, "contiguous", [30, 3], 1),
    ((2, 5, 2, 200), F16, "one of three", [2, 3], 1),  # a block of 72 or 8
    ((2, 7, 3, 20), F32, "odd heads", [1, 2], 2),
    ((3, 5, 2, 24), BF16, "odd rows", [2, 3], 1),
    ((3, 5, 2, 24), F16, "odd batch", [1, 1], 2),
    ((2, 6, 2, 40), F32, "odd start", [4, 2], 1),
    ((1, 5, 2, 24), BF16, "odd rows", [2, 3], 1),
    ((1, 1, 3, 24), F16, "odd heads", [2, 1], 2),
    ((1, 40, 1, 13), BF16, "contiguous", [17, 23], 1),
    ((1, 70, 3, 96), F32, "contiguous", [70], 1),  # several CTAs
]


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize(("shape", "dtype", "kind", "sizes", "dim"), COMPRESSIONS, ids=str)
def test_e4m3(shape: Shape, dtype: torch.dtype, kind: str, sizes: list[int], dim: int, block: int) -> None:
    torch.manual_seed(block)
    other = (shape[0], shape[1] + 1, shape[2] + 2, shape[3] + 8)
    x = [strided(shape, dtype, kind), values(other, dtype)]
    for t in x:
        t *= torch.randn(t.shape[:3])[..., None].mul(6).exp2().to(dtype)  # blocks of unlike size
        t[torch.rand(t.shape) < 0.02] = 0
        t[torch.rand(t.shape) < 0.02] = -torch.inf
        t[torch.rand(t.shape) < 0.02] = torch.nan
        t[:, :1] *= 0
    each = [sizes, one(other[dim], sizes)]
    how = {"compression": "e4m3", "block": block}
    want = reference.pack_slices(x, each, dim, **how)
    shapes = [t.shape for t in x]
    for policy in FOUR[:: 1 if block == 64 else 3]:
        got = pack_slices(x, each, dim, policy=policy, **how)
        assert torch.equal(got, want), str(policy)
        for out in (F32, BF16, F16):
            back = unpack_slices(want, shapes, each, dim, dtype=out, policy=policy, **how)
            plain = reference.unpack_slices(want, shapes, each, dim, dtype=out, **how)
            for a, b in zip(back, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(torch.signbit(a)[~a.isnan()], torch.signbit(b)[~b.isnan()])


def test_e4m3_at_the_ends_of_the_range() -> None:
    """Subnormal numbers, the largest ones of each dtype, every bit pattern of fp16."""
    torch.manual_seed(0)
    bits = torch.randperm(1 << 16)[: 1 << 14].to(torch.int32).to(torch.int16)
    for x in (
        (torch.rand(1, 8, 2, 64) * 300 - 149).clamp(-149, 127).exp2() * torch.randn(1, 8, 2, 64).sign(),
        torch.full((1, 1, 1, 40), torch.finfo(F32).max),
        torch.full((1, 1, 1, 40), 65504.0).half(),
        torch.full((1, 1, 1, 40), torch.finfo(BF16).max).bfloat16(),
        torch.full((1, 1, 1, 40), 2.0**-149),
        bits.view(F16).view(1, 128, 1, 128),
    ):
        got = pack_slices([x], [[x.shape[1]]], compression="e4m3", block=32)
        assert torch.equal(got, reference.pack_slices(x, compression="e4m3", block=32))
        back = unpack_slices(got, [x.shape], [[x.shape[1]]], compression="e4m3", block=32, dtype=x.dtype)[0]
        assert torch.equal(back.isnan(), ~x.isfinite()) and not back.isinf().any()


@pytest.mark.parametrize(("shape", "dtype", "kind", "sizes", "dim"), COMPRESSIONS, ids=str)
def test_bf16(shape: Shape, dtype: torch.dtype, kind: str, sizes: list[int], dim: int) -> None:
    torch.manual_seed(1)
    x = [strided(shape, F32 if dtype is BF16 else dtype, kind), values(shape, F32 if dtype is BF16 else dtype)]
    x[0][0, 0, 0, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    each = [sizes, sizes]
    want = reference.pack_slices(x, each, dim, compression="bf16")
    for policy in FOUR[::3]:
        got = pack_slices(x, each, dim, compression="bf16", policy=policy)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        for out in (F32, F16):
            back = unpack_slices(want, [t.shape for t in x], each, dim, compression="bf16", dtype=out, policy=policy)
            plain = reference.unpack_slices(
                want, [t.shape for t in x], each, dim, compression="bf16", dtype=out
            )  # fmt: skip
            for a, b in zip(back, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_do_and_too_much() -> None:
    for compression in (None, "bf16", "e4m3"):
        for shape in ((0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)):
            empty = torch.zeros(shape)
            assert pack_slices([empty], [[shape[1]]], compression=compression).numel() == 0
    wide = torch.zeros(1, 1, 1, 1, dtype=torch.int8).expand(1 << 16, 1 << 15, 1, 1)
    with pytest.raises(EmulatorError, match="error code 1"):
        _run("pack_slices", _params([wide], wide[0, 0, 0], [[1 << 15]], 1, None, 128), wide[0, 0, 0], LAZY_FORWARD)
