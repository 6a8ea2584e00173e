"""pack_slices and unpack_slices: a permutation, its inverse and its gradient; what compression costs; bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_fast import ops, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ANY = [*FLOATS, torch.float64, torch.complex128, torch.int16, torch.uint8]
KINDS = ["contiguous", "heads first", "one of three", "channels apart", "odd start"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same")


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "contiguous") -> Tensor:
    """[B, N, H, D] as models have it."""
    b, n, h, d = shape
    big = {
        "contiguous": (b, n, h, d), "heads first": (b, h, n, d), "one of three": (b, n, 3, h, d),
        "channels apart": (b, n, d, h), "odd start": (b, n, h, d + 3),
    }[kind]  # fmt: skip
    x = torch.randn(big).mul(50).to(dtype)
    if kind == "heads first":
        return x.transpose(1, 2)
    if kind == "one of three":
        return x[:, :, 1]
    return x.transpose(2, 3) if kind == "channels apart" else x[..., x.shape[-1] - d :]


def cut(total: int, slices: int) -> list[int]:
    """Random lengths, 0 among them."""
    places = sorted(int(i) for i in torch.randint(0, total + 1, (slices - 1,)))
    return [b - a for a, b in zip([0, *places], [*places, total], strict=True)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.flatten().clone().view(torch.uint8), b.flatten().clone().view(torch.uint8)
    )  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, signs of zeros included; any NaN is any other."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and same_bits(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 7), st.integers(0, 40)),
    slices=st.integers(1, 5),
    tensors=st.integers(1, 4),
    dim=st.sampled_from([1, 2]),
    dtype=st.sampled_from(ANY),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_a_permutation_and_its_inverse(shape, slices, tensors, dim, dtype, kind, seed) -> None:
    torch.manual_seed(seed)
    shapes = [(*shape[:2], shape[2] + i % 2, shape[3]) for i in range(tensors)]
    x = [draw(s, dtype, kind) for s in shapes]
    sizes = [cut(s[dim], slices) for s in shapes]
    buffer = ops.pack_slices(x, sizes, dim)
    assert same_bits(buffer, reference.pack_slices(x, sizes, dim))
    parts = buffer.split(ops.packed_sizes(shapes, sizes, dim))
    for rank, part in enumerate(parts):
        want = [t.split(n, dim)[rank].flatten() for t, n in zip(x, sizes, strict=True)]
        assert same_bits(part.contiguous(), torch.cat(want))
    back = ops.unpack_slices(buffer, shapes, sizes, dim)
    assert all(same_bits(a, b) and a.is_contiguous() for a, b in zip(back, x, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(0, 6), st.integers(0, 5), st.integers(0, 300)),
    slices=st.integers(1, 4),
    dim=st.sampled_from([1, 2]),
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from([k for k in KINDS if k != "channels apart"]),
    compression=st.sampled_from(["bf16", "e4m3"]),
    block=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**31),
)
def test_compression_has_the_bits_of_the_reference(shape, slices, dim, dtype, kind, compression, block, seed) -> None:
    torch.manual_seed(seed)
    shapes = [shape, (*shape[:3], shape[3] // 2 + 1)]
    x = [draw(s, dtype, kind) * torch.randn(s[-1]).mul(8).exp2().to(dtype) for s in shapes]
    if kind == "odd start":
        x = [torch.nn.functional.pad(t, (0, 1))[..., : t.shape[-1]] for t in x]
    sizes = [cut(s[dim], slices) for s in shapes]
    how = {"compression": compression, "block": block}
    buffer = ops.pack_slices(x, sizes, dim, **how)
    assert same_bits(buffer, reference.pack_slices(x, sizes, dim, **how))
    assert buffer.numel() == sum(ops.packed_sizes(shapes, sizes, dim, **how))
    for out in FLOATS:
        back = ops.unpack_slices(buffer, shapes, sizes, dim, dtype=out, **how)
        want = reference.unpack_slices(buffer, shapes, sizes, dim, dtype=out, **how)
        assert all(same(a, b) for a, b in zip(back, want, strict=True))
    made = ops.unpack_slices(buffer, shapes, sizes, dim, dtype=torch.float32, **how)  # has codes that are exact
    again = ops.unpack_slices(ops.pack_slices(made, sizes, dim, **how), shapes, sizes, dim, dtype=torch.float32, **how)
    assert all(same(a, b) for a, b in zip(again, made, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_of_e4m3(dtype: torch.dtype) -> None:
    """|error| <= max(2^-4 |x|, 2^-10 m / 224, 2^-136) and never more than 2^-4 m, m the largest of the block; zeros
    keep their sign. Magnitudes over the whole range, so that codes of every exponent and subnormal ones occur."""
    torch.manual_seed(1)
    spread = (torch.rand(64, 40, 3, 96) * 24 - 20).exp2() * torch.randn(64, 40, 3, 96).sign()
    level = (torch.rand(64, 40, 3, 1) * (240 if dtype is not torch.float16 else 24) - 130).exp2()
    if dtype is torch.float16:
        level = level * 2.0**118
    x = (spread * level).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    x[::7] = 0.0
    x[1::7, ::2] = -0.0
    for block in (32, 64, 128):
        y = ops.unpack_slices(
            ops.pack_slices(x, compression="e4m3", block=block), x.shape, compression="e4m3", block=block, dtype=dtype
        )
        wide = torch.nn.functional.pad(x.double().abs(), (0, -96 % block)).unflatten(-1, (-1, block)).amax(-1)
        largest = wide.repeat_interleave(block, -1)[..., :96]
        error, exact = (y.double() - x.double()).abs(), x.double()
        bound = torch.maximum(exact.abs() / 16, largest * 2.0**-10 / 224).clamp_min(2.0**-136)
        if dtype is torch.float16:
            bound = bound + 2.0**-25  # fp16 subnormals
        assert (error <= bound).all()
        assert (error <= torch.maximum(largest / 16, bound.new_tensor(2.0**-136))).all()
        assert (error > exact.abs() / 20).any()  # the bound is not far off
        assert torch.equal(torch.signbit(y), torch.signbit(x))
        assert not y[x == 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [32, 128])
def test_every_number_of_16_bits(dtype: torch.dtype, block: int) -> None:
    """Infinities and NaN among them: they are NaN afterwards, and their neighbours are as if they were 0."""
    torch.manual_seed(block)
    bits = torch.randperm(1 << 16).to(torch.int32).to(torch.int16)
    for x in (bits.view(dtype).view(1, 512, 128), bits.sort().values.view(dtype).view(1, 512, 128)):
        buffer = ops.pack_slices(x, compression="e4m3", block=block)
        assert torch.equal(buffer, reference.pack_slices(x, compression="e4m3", block=block))
        y = ops.unpack_slices(buffer, x.shape, compression="e4m3", block=block, dtype=dtype)
        assert torch.equal(y.isnan(), ~x.isfinite()) and not y.isinf().any()
        clean = x.where(x.isfinite(), 0)
        z = ops.unpack_slices(
            ops.pack_slices(clean, compression="e4m3", block=block),
            x.shape,
            compression="e4m3",
            block=block,
            dtype=dtype,
        )
        assert torch.equal(y[x.isfinite()], z[x.isfinite()])


def test_numbers_that_are_exact() -> None:
    """e4m3 times a power of two; also in bf16 and back."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()]
    for power in (-100, -1, 0, 7, 119):
        x = torch.ldexp(codes, torch.tensor(power))[None, None]
        x = torch.cat([x, torch.full((1, 1, 2), math.ldexp(448.0, power))], -1)
        buffer = ops.pack_slices(x, compression="e4m3", block=128)
        for dtype in (torch.float32, torch.bfloat16):
            y = ops.unpack_slices(buffer, x.shape, compression="e4m3", dtype=dtype)
            assert torch.equal(y[..., 128:].float(), x[..., 128:])  # blocks that have 448, or less than twice less
    top = torch.tensor([[[65504.0, 3.0]]]).half()  # rounds to 65,536, which is no fp16
    y = ops.unpack_slices(ops.pack_slices(top, compression="e4m3"), top.shape, compression="e4m3", dtype=torch.float16)
    assert torch.equal(y, top)
    big = torch.tensor([[[3.4e38, -3.4e38]]])
    for dtype in (torch.float32, torch.bfloat16):
        y = ops.unpack_slices(ops.pack_slices(big, compression="e4m3"), big.shape, compression="e4m3", dtype=dtype)
        assert y.isfinite().all()


def test_bytes_of_a_message() -> None:
    """One message: codes, a scale per block, both padded to 16 bytes with zeros."""
    x = torch.randn(2, 7, 200)
    buffer = ops.pack_slices(x, compression="e4m3", block=64)
    codes, scales = 2 * 7 * 200, 2 * 7 * 4
    assert ops.packed_sizes(x.shape, compression="e4m3", block=64) == [buffer.numel()] == [2800 + 64]
    assert codes == 2800 and not buffer[codes + scales :].any() and buffer[codes : codes + scales].all()
    assert ops.pack_slices(x, compression="bf16").dtype is torch.bfloat16
    half = x.bfloat16()
    assert same_bits(ops.pack_slices(half, compression="bf16"), half.flatten())


def test_an_exchange_of_heads_for_rows() -> None:
    """Ulysses by hand, on uneven rows and heads and grouped key heads, there and back."""
    torch.manual_seed(3)
    rows, heads, kv_heads, ranks = [5, 0, 9, 3], [2, 2, 1, 1], [1, 1, 1, 0], 4
    shapes = [(2, 17, 6, 16), (2, 17, 3, 16), (2, 17, 3, 8)]
    whole = [torch.randn(s) for s in shapes]
    sizes = [heads, kv_heads, kv_heads]

    def exchange(sent: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat([sent[source][rank] for source in range(ranks)]) for rank in range(ranks)]

    own = [[t.split(rows, 1)[rank] for t in whole] for rank in range(ranks)]
    sent = [
        list(ops.pack_slices(x, sizes, 2).split(ops.packed_sizes([t.shape for t in x], sizes, 2))) for x in own
    ]  # fmt: skip
    back = []
    for rank, got in enumerate(exchange(sent)):
        local = [(2, 17, n[rank], s[3]) for n, s in zip(sizes, shapes, strict=True)]
        x = ops.unpack_slices(got, local, rows, 1)
        for a, t, n in zip(x, whole, sizes, strict=True):
            assert torch.equal(a, t.split(n, 2)[rank])
        back.append(list(ops.pack_slices(x, rows, 1).split(ops.packed_sizes(local, rows, 1))))
    for rank, got in enumerate(exchange(back)):
        x = ops.unpack_slices(got, [t.shape for t in own[rank]], sizes, 2)
        assert all(torch.equal(a, b) for a, b in zip(x, own[rank], strict=True))


def test_gradients_are_the_other_operator() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = [torch.randn(2, 7, 3, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
        sizes = [4, 0, 3]
        buffer = ops.pack_slices(x, sizes)
        weight = torch.randn_like(buffer)
        got = torch.autograd.grad((buffer * weight).sum(), x)
        want = torch.autograd.grad((reference.pack_slices(x, sizes) * weight).sum(), x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        packed = torch.randn(buffer.shape, dtype=dtype, requires_grad=True)
        first, _ = ops.unpack_slices(packed, [t.shape for t in x], sizes)  # one of the results is not used
        (grad,) = torch.autograd.grad((first**2).sum(), packed)
        want_first = reference.unpack_slices(packed, [t.shape for t in x], sizes)[0]
        assert torch.equal(grad, torch.autograd.grad((want_first**2).sum(), packed)[0])
    y = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    there_and_back = lambda t: ops.unpack_slices(ops.pack_slices(t, [1, 3]) ** 2, t.shape, [1, 3])  # noqa: E731
    assert torch.autograd.gradcheck(there_and_back, (y,)) and torch.autograd.gradgradcheck(there_and_back, (y,))


@pytest.mark.parametrize("compression", ["bf16", "e4m3"])
def test_compression_refuses_gradients(compression: str) -> None:
    x = torch.randn(1, 4, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="pack_slices has no gradient with compression"):
        ops.pack_slices(x, compression=compression)
    with torch.no_grad():
        buffer = ops.pack_slices(x, compression=compression)
    if compression == "bf16":
        with pytest.raises(RuntimeError, match="unpack_slices has no gradient with compression"):
            ops.unpack_slices(buffer.requires_grad_(), x.shape, compression=compression, dtype=torch.float32)


def test_opcheck() -> None:
    x = [torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(2, 5, 2, 8)]
    pack, unpack = torch.ops.vdit_fast.pack_slices, torch.ops.vdit_fast.unpack_slices
    torch.library.opcheck(pack, (x, [1, 2, 2, 0], 2, 0, 128))
    torch.library.opcheck(unpack, (torch.randn(200, requires_grad=True), [1, 5, 5, 8], [2, 3], 1, 0, 128, 0))
    for code in (1, 2):
        sent = [t.detach() for t in x]
        torch.library.opcheck(pack, (sent, [1, 2, 2, 0], 2, code, 32))
        buffer = pack(sent, [1, 2, 2, 0], 2, code, 32)
        torch.library.opcheck(unpack, (buffer, [2, 5, 3, 8, 2, 5, 2, 8], [1, 2, 2, 0], 2, code, 32, 1))


def test_compiles_without_a_break() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q: Tensor, k: Tensor) -> list[Tensor]:
        buffer = ops.pack_slices((q * 2, k), [1, 2], 2)
        coded = ops.pack_slices(q, compression="e4m3", block=32)
        back = ops.unpack_slices(coded, q.shape, compression="e4m3", block=32, dtype=torch.float32)
        return [*ops.unpack_slices(buffer, [q.shape, k.shape], [1, 2], 2), back]

    q, k = torch.randn(2, 6, 3, 40), torch.randn(2, 6, 3, 40)
    a, b, c = f(q, k)
    assert torch.equal(a, q * 2) and torch.equal(b, k) and (c - q).abs().max() <= q.abs().max() / 16


def test_bad_input() -> None:
    x, four = torch.randn(2, 9, 8), torch.randn(2, 9, 3, 8)
    for arguments, options, message in (
        (([],), {}, "pass tensors"),
        (([x] * 5,), {}, "5 tensors; pass 1 to 4"),
        ((x[0],), {}, r"pass tensors \[B, N, C\]"),
        ((x, [8], 2), {}, "dim is 2; expected 1, or 2 for tensors"),
        ((four, None, 3), {}, "dim is 3"),
        ((x, [4, 4]), {}, r"sizes \[4, 4\] do not add up to 9"),
        ((x, [-1, 10]), {}, "do not add up"),
        ((x, []), {}, "expected one list"),
        (([x, x], [[9], [4, 5]]), {}, "equal length per tensor"),
        (([x, x[:, :5]], [9]), {}, "do not add up to 5"),
        (([x, x[:1]],), {}, "the batch must be the same"),
        (([x, x.half()],), {}, r"x\[1\] is float16 but x\[0\] is float32"),
        ((x, [1] * 9 + [0] * 56), {}, "at most 64"),
        ((x,), {"compression": "fp8"}, 'expected None, "bf16" or "e4m3"'),
        ((x,), {"compression": "e4m3", "block": 48}, "block is 48; expected 32, 64 or 128"),
        ((x.double(),), {"compression": "e4m3"}, "float64"),
        ((x.long(),), {"compression": "bf16"}, "int64"),
        ((x.transpose(1, 2),), {"compression": "e4m3"}, "stride 8 in its last dimension"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.pack_slices(*arguments, **options)
    flat, bytes_ = torch.randn(144), torch.zeros(160, dtype=torch.uint8)
    for arguments, options, message in (
        ((flat, (2, 9, 9)), {}, "buffer has 144 elements; expected 162"),
        ((flat.view(2, 72), (2, 9, 8)), {}, "expected one contiguous dimension"),
        ((torch.randn(288)[::2], (2, 9, 8)), {}, "expected one contiguous dimension"),
        ((flat, (2, 72)), {}, "pass tensors"),
        ((flat, (2, 9, 8)), {"dtype": torch.float16}, "without compression it is the buffer's"),
        ((bytes_, (2, 9, 8)), {"compression": "e4m3"}, "dtype is None; with compression pass float32"),
        ((flat, (2, 9, 8)), {"compression": "e4m3", "dtype": torch.float32}, "buffer is float32; expected uint8"),
        ((bytes_, (2, 9, 8)), {"compression": "e4m3", "dtype": torch.float32}, "buffer has 160 elements; expected 176"),
        ((flat, (2, -9, -8)), {}, "add up|sizes must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.unpack_slices(*arguments, **options)


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    for dtype in FLOATS:
        x = [draw((2, 1000, h, 64), dtype, "heads first") for h in (5, 3)]
        x[0][0, 5, 2, :2] = torch.tensor([math.inf, math.nan])
        device = [t.cuda() for t in x]
        for sizes, dim in (([[2, 2, 1], [1, 1, 1]], 2), ([100, 0, 900], 1)):
            for compression in (None, "bf16", "e4m3"):
                buffer = ops.pack_slices(device, sizes, dim, compression=compression)
                assert same_bits(buffer.cpu(), ops.pack_slices(x, sizes, dim, compression=compression))
                out = dtype if compression else None
                shapes = [t.shape for t in x]
                back = ops.unpack_slices(buffer, shapes, sizes, dim, compression=compression, dtype=out)
                want = ops.unpack_slices(buffer.cpu(), shapes, sizes, dim, compression=compression, dtype=out)
                for a, b in zip(back, want, strict=True):
                    torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
