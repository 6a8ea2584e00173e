"""short_attention against fp64, torch's own attention and its reference; layouts, masks, NaN, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from vdit_fast.ops import short_attention
from vdit_fast.reference import short_attention as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, queries, keys, places, heads, dim: the temporal layers of SVD, AnimateDiff and Latte, then tails and edges
SHAPES = [
    (1, 25, 25, 6, 5, 64),
    (2, 14, 14, 3, 2, 64),
    (1, 16, 16, 3, 8, 40),
    (1, 16, 16, 2, 2, 160),
    (1, 16, 16, 3, 2, 72),
    (1, 32, 32, 2, 3, 80),
    (3, 8, 33, 2, 2, 72),
    (1, 64, 64, 1, 2, 128),
    (1, 61, 64, 1, 1, 256),
    (2, 131, 7, 1, 2, 8),
    (1, 5, 2, 2, 1, 33),
    (1, 1, 63, 2, 1, 7),
    (2, 3, 17, 1, 3, 1),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    b, lq, lk, s, h, d = shape
    q, k, v = (torch.randn(b, n, s, h, d, generator=g) for n in (lq, lk, lk))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Torch's attention on transposed copies, as the models call it."""
    b, lq, s, h, d = q.shape
    query, key, value = (x.permute(0, 2, 3, 1, 4).reshape(b * s, h, -1, d) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.view(b, s, h, lq, d).permute(0, 3, 1, 2, 4)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def causal_mask(lq: int, lk: int) -> Tensor:
    return torch.arange(lk) <= torch.arange(lq)[:, None] + lk - lq


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    q, k, v = draw(shape, dtype)
    truth = reference(q.double(), k.double(), v.double(), causal=causal)
    mask = causal_mask(shape[1], shape[2]) if causal else None
    allowed = 2 * error(eager(q, k, v, mask).nan_to_num(), truth) + torch.finfo(dtype).eps
    assert error(short_attention(q, k, v, causal=causal), truth) <= allowed


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale: float) -> None:
    q, k, v = draw((1, 9, 13, 2, 2, 24))
    torch.testing.assert_close(short_attention(q, k, v, scale=scale), eager(q, k, v, scale=scale))
    if scale == 0:
        torch.testing.assert_close(short_attention(q, k, v, scale=scale), v.mean(1, keepdim=True).expand_as(q))


def test_causal_rows_see_the_past_only() -> None:
    q, k, v = draw((1, 8, 12, 2, 2, 16))
    whole = short_attention(q, k, v, causal=True)
    for i in range(8):  # row i alone, over the keys it reads
        keys = i + 1 + 12 - 8
        torch.testing.assert_close(whole[:, i : i + 1], short_attention(q[:, i : i + 1], k[:, :keys], v[:, :keys]))
    more_queries = short_attention(q, k[:, :5], v[:, :5], causal=True)
    assert torch.equal(more_queries[:, :3], torch.zeros(1, 3, 2, 2, 16))
    assert bool((more_queries[:, 3:] != 0).any(-1).all())


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_own_number_of_keys_per_batch_item(integer: torch.dtype, causal: bool) -> None:
    q, k, v = draw((5, 7, 11, 2, 3, 24))
    counts = [0, 1, 5, 11, 40]
    got = short_attention(q, k, v, causal=causal, kv_len=torch.tensor(counts, dtype=integer))
    for b, n in enumerate(counts):
        mask = (causal_mask(7, 11) if causal else torch.ones(7, 11, dtype=torch.bool)) & (torch.arange(11) < n)
        torch.testing.assert_close(got[b : b + 1], eager(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask).nan_to_num())
    strided = torch.tensor(counts, dtype=integer).repeat_interleave(2)[::2]
    assert torch.equal(got, short_attention(q, k, v, causal=causal, kv_len=strided))
    below = short_attention(q, k, v, kv_len=torch.full((5,), -3, dtype=integer))
    assert torch.equal(below, torch.zeros_like(q))


LAYOUTS = {
    "frames first": lambda b, n, s, h, d: torch.randn(b, n, s, h, d),
    "places first": lambda b, n, s, h, d: torch.randn(b, s, n, h, d).transpose(1, 2),
    "heads first": lambda b, n, s, h, d: torch.randn(b, s, h, n, d).permute(0, 3, 1, 2, 4),
    "of a fused projection": lambda b, n, s, h, d: torch.randn(b, n, s, 3, h, d)[:, :, :, 1],
    "every second column": lambda b, n, s, h, d: torch.randn(b, n, s, h, 2 * d)[..., ::2],
    "columns outside": lambda b, n, s, h, d: torch.randn(d, b, n, s, h).permute(1, 2, 3, 4, 0),
    "one sequence for all": lambda b, n, s, h, d: torch.randn(1, n, 1, h, d).expand(b, n, s, h, d),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q, k, v = (LAYOUTS[layout](2, n, 3, 2, 40).to(dtype) for n in (9, 19, 19))
    if dtype != torch.float32:  # a conversion makes contiguous what overlaps
        q, k, v = (LAYOUTS[layout](2, n, 3, 2, 40).to(dtype).as_strided(x.shape, x.stride()) for n, x in
                   ((9, q), (19, k), (19, v)))  # fmt: skip
    got = short_attention(q, k, v, causal=True)
    assert got.stride() == torch.empty_like(q).stride()
    plain = short_attention(*(x.contiguous() for x in (q, k, v)), causal=True)
    assert torch.equal(got, plain)
    mixed = short_attention(q.contiguous(), k, v.contiguous(), causal=True)
    assert torch.equal(mixed, plain) and mixed.is_contiguous()


def test_four_dimensions_are_one_place() -> None:
    q, k, v = draw((2, 9, 13, 1, 2, 24))
    got = short_attention(q.squeeze(2), k.squeeze(2), v.squeeze(2), causal=True)
    assert torch.equal(got, short_attention(q, k, v, causal=True).squeeze(2))
    four = reference(q.squeeze(2), k.squeeze(2), v.squeeze(2), causal=True)
    torch.testing.assert_close(got, four)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_is_its_value(dtype: torch.dtype) -> None:
    q, k, v = draw((3, 6, 1, 2, 2, 24), dtype)
    q[0, 0], k[1] = torch.nan, torch.inf  # not looked at
    v[2, 0, 0, 0, :3] = torch.tensor([torch.inf, -0.0, torch.nan], dtype=dtype)
    got, want = short_attention(q, k, v), v.expand_as(q).contiguous()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits), want.view(bits))
    half = short_attention(q, k, v, kv_len=torch.tensor([1, 0, 1]))
    assert torch.equal(half[1], torch.zeros_like(half[1])) and torch.equal(half[0], v[0].expand_as(half[0]))
    last = short_attention(q, k, v, causal=True)
    assert torch.equal(last[:, :-1], torch.zeros_like(last[:, :-1]))
    assert torch.equal(last[:2, -1], v[:2, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_numbers_that_are_not_finite_land_where_torch_has_them(place: str, number: float, dtype: torch.dtype) -> None:
    q, k, v = draw((2, 9, 11, 2, 2, 24), dtype)
    {"q": q, "k": k, "v": v}[place][1, 4, 1, 0, 5] = number
    got, want = short_attention(q, k, v), eager(q.float(), k.float(), v.float())
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    kept = ~want.isnan() & ~want.isinf()
    torch.testing.assert_close(got[kept].float(), want[kept], rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_unread_keys_reach_no_row(number: float, dtype: torch.dtype) -> None:
    q, k, v = draw((2, 9, 13, 2, 2, 24), dtype)
    want = short_attention(q, k, v, causal=True, kv_len=torch.tensor([13, 6]))
    k[1, 6:], v[1, 6:], k[0, 12], v[0, 12] = number, number, number, number
    got = short_attention(q, k, v, causal=True, kv_len=torch.tensor([13, 6]))
    torch.testing.assert_close(got[0, :8], want[0, :8])  # the last row alone reads key 12
    assert torch.equal(got[1], want[1])
    assert not bool(got[0, 8].isfinite().any())
    torch.testing.assert_close(reference(q, k, v, causal=True, kv_len=torch.tensor([13, 6])), got, equal_nan=True)


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 3, 2, 2, 8), (2, 0, 3, 2, 2, 8), (2, 3, 3, 0, 2, 8), (2, 3, 3, 2, 0, 8), (2, 3, 0, 2, 2, 8)],
    ids=str,
)
def test_empty(shape: tuple[int, ...]) -> None:
    q, k, v = draw(shape)
    got = short_attention(q, k, v)
    assert got.shape == q.shape and torch.equal(got, torch.zeros_like(q))
    torch.testing.assert_close(got, reference(q, k, v))


def test_many_sequences_in_many_threads() -> None:
    q, k, v = draw((2, 4, 6, 301, 3, 8))
    torch.testing.assert_close(short_attention(q, k, v), eager(q, k, v))
    assert torch.equal(short_attention(q, k, v), short_attention(q, k, v))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("counts", [None, (3, 0)], ids=str)
def test_gradients(causal: bool, counts: tuple[int, ...] | None) -> None:
    q, k, v = (x.requires_grad_() for x in draw((2, 5, 4, 2, 2, 6)))
    kv_len = torch.tensor(counts) if counts else None
    dout = torch.randn(2, 5, 2, 2, 6, dtype=torch.float64)
    got = torch.autograd.grad(short_attention(q, k, v, causal=causal, kv_len=kv_len), (q, k, v), dout.float())
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(reference(*wide, causal=causal, kv_len=kv_len), wide, dout)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    four = [x.detach()[:, :, 0].requires_grad_() for x in (q, k, v)]
    assert all(x is not None for x in torch.autograd.grad(short_attention(*four).sum(), four))


def test_unread_keys_reach_no_gradient() -> None:
    q, k, v = draw((2, 5, 4, 2, 2, 6))
    kv_len, grads = torch.tensor([2, 3]), []
    for junk in (0.0, torch.nan, torch.inf):
        for x in (k, v):
            x[0, 2:], x[1, 3:] = junk, junk
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(short_attention(*leaves, kv_len=kv_len).square().sum(), leaves))
    assert all(map(torch.equal, grads[0], grads[1])) and all(map(torch.equal, grads[0], grads[2]))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("lengths", [(5, 5), (4, 7), (7, 4)], ids=str)
def test_gradients_feel_what_is_read_only(lengths: tuple[int, int], place: str, number: float) -> None:
    """Causal rows, padded keys, rows without any: every pair by itself, from rows that read nothing else."""
    q, k, v = draw((2, *lengths, 2, 1, 6))
    dout, kv_len = torch.randn_like(q), torch.tensor([lengths[1], 3])
    {"q": q, "k": k, "v": v, "dout": dout}[place][:, -2 if place in ("q", "dout") else 2, 1, 0, 4] = number
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(short_attention(*leaves, causal=True, kv_len=kv_len), leaves, dout)
    want = [torch.zeros_like(x) for x in leaves]
    for b in range(2):
        for row in range(lengths[0]):
            keys = min(row + lengths[1] - lengths[0] + 1, int(kv_len[b]))
            if keys <= 0:
                continue
            one = [x[b : b + 1].clone().requires_grad_() for x in (q[:, row : row + 1], k[:, :keys], v[:, :keys])]
            parts = torch.autograd.grad(eager(*one), one, dout[b : b + 1, row : row + 1])
            want[0][b, row] += parts[0][0, 0]
            want[1][b, :keys] += parts[1][0]
            want[2][b, :keys] += parts[2][0]
    assert any(not x.isfinite().all() for x in want) and any(x.isfinite().any() for x in want)
    for a, b_ in zip(got, want, strict=True):
        assert torch.equal(a.isfinite(), b_.isfinite())
        torch.testing.assert_close(a.nan_to_num(0, 0, 0), b_.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-5)


def test_operator_checks() -> None:
    q, k, v = (x.requires_grad_() for x in draw((2, 5, 4, 2, 2, 8)))
    op = torch.ops.vdit_fast.short_attention.default
    torch.library.opcheck(op, (q, k, v, 0.3, True, torch.tensor([4, 2])))
    torch.library.opcheck(op, (q.detach().transpose(1, 2).contiguous().transpose(1, 2), k.detach(), v.detach(), 0.3))


def test_compiles_without_a_break() -> None:
    q, k, v = (x.requires_grad_() for x in draw((2, 5, 4, 2, 2, 8)))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (short_attention(2 * q, k, v, causal=True) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_bad_input() -> None:
    q, k, v = draw((2, 5, 4, 2, 2, 8))
    wide, many = torch.randn(2, 5, 2, 2, 264), torch.randn(1, 1, 1, 1, 8).expand(2, 65, 2**15, 2**15, 8)
    for arguments, options, message in (
        ((q[:, :, 0, 0], k, v), {}, r"q has shape \[2, 5, 8\].*unsqueeze"),
        ((q.double(), k, v), {}, "q.*float64"),
        ((q, k.half(), v), {}, "k is float16 but q is float32"),
        ((q, k[:1], v), {}, r"k has shape \[1, 4, 2, 2, 8\]; expected \[2, 4, 2, 2, 8\]"),
        ((q, k, v[:, :3]), {}, r"v has shape \[2, 3, 2, 2, 8\]; expected \[2, 4"),
        ((q, k.repeat(1, 17, 1, 1, 1), v.repeat(1, 17, 1, 1, 1)), {}, "k has 68 keys; at most 64"),
        ((wide, wide, wide), {}, "head dimension 264"),
        ((q[..., :0], k[..., :0], v[..., :0]), {}, "head dimension 0"),
        ((many, many[:, :4], many[:, :4]), {}, "4294967296 sequences.*split"),
        ((q, k, v), {"scale": float("nan")}, "scale is nan"),
        ((q, k, v), {"kv_len": torch.ones(3, dtype=torch.int32)}, r"kv_len has shape \[3\].*\[2\]"),
        ((q, k, v), {"kv_len": torch.ones(2)}, "kv_len is float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            short_attention(*arguments, **options)
