"""The short-attention kernels (csrc/kernels/short), emulated, against fp64 and against the CPU kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from emulator_short_attention import short_attention
from torch import Tensor

from emulator import RANDOMS, Policy, stats
from vdit_fast.ops import short_attention as on_cpu
from vdit_fast.reference import short_attention as reference

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
# batch, queries, keys, places, heads, dim: every number of key steps, dims that do not fill a step, long query lists
SHAPES = [
    (1, 16, 16, 1, 2, 40),
    (1, 25, 25, 2, 1, 64),
    (2, 5, 33, 1, 1, 72),
    (1, 33, 64, 1, 1, 160),
    (1, 70, 2, 1, 2, 8),
    (1, 1, 48, 1, 3, 104),
    (1, 3, 49, 1, 1, 256),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    b, lq, lk, s, h, d = shape
    q, k, v = (torch.randn(b, n, s, h, d, generator=g) for n in (lq, lk, lk))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (x.movedim(1, 3) for x in (q, k, v))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).movedim(3, 1).nan_to_num()


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    q, k, v = draw(shape, dtype)
    lq, lk = shape[1:3]
    truth = reference(q.double(), k.double(), v.double(), causal=causal)
    mask = torch.arange(lk) <= torch.arange(lq)[:, None] + lk - lq if causal else None
    allowed = 2 * error(eager(q, k, v, mask), truth) + torch.finfo(dtype).eps
    assert error(short_attention(q, k, v, causal=causal), truth) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_gives_the_same(policy: Policy, dtype: torch.dtype) -> None:
    for shape in ((2, 18, 21, 1, 2, 24), (1, 67, 17, 1, 1, 40)):
        q, k, v = draw(shape, dtype)
        kv_len = torch.tensor([19, 12][: shape[0]])
        want = short_attention(q, k, v, causal=True, kv_len=kv_len)
        torch.testing.assert_close(want, on_cpu(q, k, v, causal=True, kv_len=kv_len), rtol=2e-2, atol=2e-2)
        assert torch.equal(short_attention(q, k, v, causal=True, kv_len=kv_len, policy=policy), want)
        assert torch.equal(
            short_attention(q, k, v, policy=policy), short_attention(q, k, v, policy=policy.with_seed(9))
        )


LAYOUTS = {
    "places first": lambda b, n, s, h, d: torch.randn(b, s, n, h, d).transpose(1, 2),
    "heads first": lambda b, n, s, h, d: torch.randn(b, s, h, n, d).permute(0, 3, 1, 2, 4),
    "of a fused projection": lambda b, n, s, h, d: torch.randn(b, n, s, 3, h, d)[:, :, :, 1],
    "every second column": lambda b, n, s, h, d: torch.randn(b, n, s, h, 2 * d)[..., ::2],
    "columns outside": lambda b, n, s, h, d: torch.randn(d, b, n, s, h).permute(1, 2, 3, 4, 0),
    "odd dim": lambda b, n, s, h, d: torch.randn(b, n, s, h, d + 1),
    "one sequence for all": lambda b, n, s, h, d: torch.randn(1, n, 1, h, d).expand(b, n, s, h, d),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)

    def view(n: int) -> Tensor:
        x = LAYOUTS[layout](2, n, 2, 2, 24)
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x) if 0 not in x.stride() else x.to(dtype)

    q, k, v = view(9), view(19), view(19)
    got = short_attention(q, k, v, causal=True)
    want = reference(q.double(), k.double(), v.double(), causal=True)
    assert error(got, want) <= 2 * error(on_cpu(q, k, v, causal=True), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_own_number_of_keys_per_batch_item(integer: torch.dtype, dtype: torch.dtype) -> None:
    q, k, v = draw((5, 7, 18, 1, 2, 16), dtype)
    kv_len = torch.tensor([0, 1, 5, 40, -3], dtype=integer).repeat_interleave(2)[::2]
    for b, n in enumerate((0, 1, 5, 18, 0)):
        k[b, n:], v[b, n:] = torch.nan, torch.inf
    got = short_attention(q, k, v, kv_len=kv_len)
    torch.testing.assert_close(got, on_cpu(q, k, v, kv_len=kv_len), rtol=2e-2, atol=2e-2)
    assert torch.equal(got[0], torch.zeros_like(got[0])) and torch.equal(got[4], got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_numbers_that_are_not_finite(place: str, number: float, dtype: torch.dtype) -> None:
    q, k, v = draw((2, 9, 11, 1, 2, 24), dtype)
    {"q": q, "k": k, "v": v}[place][1, 4, 0, 0, 5] = number
    for causal in (False, True):
        got, want = short_attention(q, k, v, causal=causal), on_cpu(q, k, v, causal=causal)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        kept = want.isfinite()
        torch.testing.assert_close(got[kept], want[kept], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 7])
def test_one_key_is_its_value(dim: int, dtype: torch.dtype) -> None:
    q, k, v = draw((3, 70, 1, 1, 2, dim), dtype)
    q[0, 0] = torch.nan
    v[2, 0, 0, 0, :3] = torch.tensor([torch.inf, -0.0, torch.nan], dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for options in ({}, {"causal": True}, {"kv_len": torch.tensor([1, 0, 5])}):
        got, want = short_attention(q, k, v, **options), on_cpu(q, k, v, **options)
        assert torch.equal(got.view(bits), want.view(bits)), options


def test_tensor_cores_do_the_work_where_rows_are_aligned() -> None:
    q, k, v = draw((1, 25, 25, 1, 1, 64), torch.bfloat16)
    stats("short_attention")
    short_attention(q, k, v)
    counted = stats("short_attention")
    # 2 row tiles of 4 steps over the dim x 4 key groups, and as many for the values (2 key steps x 8 dim groups)
    assert counted.mma == 2 * (4 * 4 + 2 * 8)
    assert counted.ldmatrix_conflicts == 0
    short_attention(q[..., :63], k[..., :63], v[..., :63])
    assert stats("short_attention").mma == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pick = lambda high, low=1: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    shape = (pick(2), pick(80), pick(64, 2), pick(3), pick(2), 8 * pick(12) - (pick(7) if seed % 4 == 3 else 0))
    q, k, v = draw(shape, DTYPES[seed % 3], seed)
    kv_len = torch.randint(0, shape[2] + 2, (shape[0],), generator=g)
    got = short_attention(q, k, v, causal=seed % 2 == 0, kv_len=kv_len, policy=RANDOMS[seed % 3])
    torch.testing.assert_close(got, on_cpu(q, k, v, causal=seed % 2 == 0, kv_len=kv_len), rtol=2e-2, atol=2e-2)


def test_empty() -> None:
    q, k, v = draw((2, 3, 4, 1, 2, 8), torch.float16)
    assert short_attention(q[:0], k[:0], v[:0]).shape == (0, 3, 1, 2, 8)
    for dtype in DTYPES:
        none = short_attention(q.to(dtype), k[:, :0].to(dtype), v[:, :0].to(dtype))
        assert torch.equal(none, torch.zeros_like(none))
