"""The merge operator against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_fast.ops import merge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The formula, differentiable, in the dtype of its inputs (tests pass fp64)."""
    stacked = torch.stack(lses)
    empty = (stacked == -torch.inf).all(0)
    lse = stacked.logsumexp(0)
    weights = torch.where(empty, 0.0, torch.exp(stacked - torch.where(empty, 0.0, lse)))
    out = sum(w.transpose(1, 2).unsqueeze(-1) * o for w, o in zip(weights, outs, strict=True))
    return torch.where(empty.transpose(1, 2).unsqueeze(-1), 0.0, out), lse


def parts(n: int, shape: tuple[int, int, int, int], dtype: torch.dtype, spread: float = 5.0):
    """n random parts; shape is [batch, length, heads, dim]."""
    b, length, h, _ = shape
    return (
        [torch.randn(shape).to(dtype) for _ in range(n)],
        [torch.randn(b, h, length) * spread for _ in range(n)],
    )


def check(outs: list[Tensor], lses: list[Tensor]) -> None:
    out, lse = merge(outs, lses)
    want_out, want_lse = oracle([o.double() for o in outs], [x.double() for x in lses])
    assert out.dtype == outs[0].dtype and lse.dtype == torch.float32
    assert out.shape == outs[0].shape and out.is_contiguous() and lse.is_contiguous()
    # fp32 arithmetic, then one rounding to the result's dtype.
    scale = max((o.double().abs().max().item() for o in outs if o.numel()), default=0.0)
    tolerance = {"rtol": torch.finfo(out.dtype).eps, "atol": 2e-6 * scale + torch.finfo(out.dtype).tiny}
    torch.testing.assert_close(out.double(), want_out, **tolerance, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 32])
@pytest.mark.parametrize("shape", [(2, 37, 3, 64), (1, 1, 1, 1), (1, 5, 2, 300), (3, 2, 1, 7)], ids=str)
def test_matches_the_formula(dtype: torch.dtype, n: int, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    check(*parts(n, shape, dtype))


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 2, 0)], ids=str)
def test_accepts_empty_tensors(shape: tuple[int, int, int, int]) -> None:
    check(*parts(2, shape, torch.float32))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 9, 4, 70))),
    n=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    empty=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_may_be_empty(shape: tuple[int, int, int, int], n: int, dtype: torch.dtype, empty: float, seed: int):
    torch.manual_seed(seed)
    outs, lses = parts(n, shape, dtype)
    lses = [torch.where(torch.rand_like(x) < empty, -torch.inf, x) for x in lses]
    check(outs, lses)


def test_a_row_empty_in_all_parts_is_exactly_zero() -> None:
    outs, lses = parts(3, (2, 6, 2, 16), torch.float32)
    for out, lse in zip(outs, lses, strict=True):
        lse[1, 0, 2] = -torch.inf
        out[1, 2, 0] = torch.nan  # an executor may leave anything in a row it never wrote
    out, lse = merge(outs, lses)
    assert lse[1, 0, 2] == -torch.inf and (out[1, 2, 0] == 0).all()
    assert out.isfinite().all()


def test_extreme_log_sum_exps() -> None:
    outs, lses = parts(2, (1, 4, 1, 8), torch.float32)
    lses[0][:], lses[1][:] = 3e4, torch.tensor([3e4, -3e4, 1e-3, 3e4 - 1])
    check(outs, lses)
    out, _ = merge(outs, lses)
    assert torch.equal(out[0, 1], outs[0][0, 1])


@pytest.mark.parametrize("where", ["outs", "lses"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_non_finite_inputs_follow_the_formula(where: str, value: float) -> None:
    torch.manual_seed(1)
    outs, lses = parts(3, (1, 5, 2, 8), torch.float32)
    (outs[1][0, 3, 1] if where == "outs" else lses[1][0, 1, 3:4])[0] = value
    check(outs, lses)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_reads_and_rounds_every_16_bit_number_like_torch(dtype: torch.dtype) -> None:
    bits, one = torch.arange(-(2**15), 2**15).to(torch.int16), torch.zeros(1, 1, 1)
    for shift in (0, 1, 7, 1024, 1025, 30000):
        # Half of a + b is exact in fp32, so what is compared is reading every number and rounding the result.
        a, b = bits.view(dtype), bits.roll(shift).view(dtype)
        out, _ = merge([a.view(1, 1, 1, -1), b.view(1, 1, 1, -1)], [one, one])
        want = (a.float() * 0.5 + b.float() * 0.5).to(dtype)
        torch.testing.assert_close(out.flatten(), want, rtol=0, atol=0, equal_nan=True)


def test_any_strides() -> None:
    torch.manual_seed(2)
    b, length, h, d = 2, 9, 3, 16
    outs = [
        torch.randn(b, h, length, d).transpose(1, 2),
        torch.randn(b, length, h, 2 * d)[..., ::2],
        torch.randn(1, length, h, d).expand(b, -1, -1, -1),
        torch.randn(d, h, length, b).permute(3, 2, 1, 0),
    ]
    lses = [
        torch.randn(b, h, length),
        torch.randn(b, length, h).transpose(1, 2),
        torch.randn(1, h, 1).expand(b, -1, length),
        torch.randn(b, h, 2 * length)[..., 1::2],
    ]
    check(outs, lses)


def test_is_bitwise_repeatable_for_any_thread_count() -> None:
    outs, lses = parts(4, (2, 700, 3, 64), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(merge(outs, lses))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


@pytest.mark.parametrize("with_empty_rows", [False, True])
@pytest.mark.parametrize("use", ["out", "lse", "both"])
def test_gradients(with_empty_rows: bool, use: str) -> None:
    torch.manual_seed(3)
    outs, lses = parts(3, (2, 5, 2, 8), torch.float32, spread=1.0)
    if with_empty_rows:
        for i, lse in enumerate(lses):
            lse[:, 0, : 2 + i] = -torch.inf
    grad_out, grad_lse = torch.randn(2, 5, 2, 8), torch.randn(2, 2, 5)

    def gradients(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (*outs, *lses)]
        out, lse = function(leaves[:3], leaves[3:])
        kept = torch.where(lse == -torch.inf, 0.0, lse)  # an empty row's lse is a constant
        loss = (use != "lse") * (out * grad_out).sum() + (use != "out") * (kept * grad_lse).sum()
        return torch.autograd.grad(loss, leaves)

    for got, want in zip(gradients(merge, torch.float32), gradients(safe_oracle, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def safe_oracle(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`oracle` with -inf replaced by a number far below the others: its autograd has no NaN then."""
    low = [torch.where(x == -torch.inf, -1e4, x) for x in lses]
    out, lse = oracle(outs, low)
    empty = lse < -9e3
    return torch.where(empty.transpose(1, 2).unsqueeze(-1), 0.0, out), torch.where(empty, -torch.inf, lse)


def test_gradients_have_the_dtype_of_their_inputs() -> None:
    outs, lses = parts(2, (1, 3, 2, 4), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (*outs, *lses)]
    merge(outs, lses)[0].float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    outs, lses = parts(2, (2, 5, 3, 8), dtype)
    outs[1] = outs[1].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.vdit_fast.merge, (outs, lses))
    leaves = [[t.requires_grad_() for t in ts] for ts in (outs, lses)]
    torch.library.opcheck(torch.ops.vdit_fast.merge, tuple(leaves))


GOOD = parts(2, (2, 5, 3, 8), torch.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "0 outs and 0 lses; pass at least one part"),
        (GOOD[0], GOOD[1][:1], "2 outs but 1 lses"),
        (GOOD[0] * 17, GOOD[1] * 17, "34 parts; at most 32 at once, merge them in groups"),
        ([GOOD[0][0], GOOD[0][1].half()], GOOD[1], r"outs\[1\] is float16 but outs\[0\] is float32"),
        ([o.double() for o in GOOD[0]], GOOD[1], r"outs\[0\] is float64; convert it to float32"),
        (GOOD[0], [GOOD[1][0], GOOD[1][1].double()], r"lses\[1\] is float64; log-sum-exps must be float32"),
        (
            [GOOD[0][0], GOOD[0][1][:, :4]],
            GOOD[1],
            r"outs\[1\] has shape \[2, 4, 3, 8\] but outs\[0\] has \[2, 5, 3, 8\]",
        ),
        ([o[0] for o in GOOD[0]], GOOD[1], r"outs\[0\] has shape \[5, 3, 8\]; expected \[batch, length, heads, dim\]"),
        (
            GOOD[0],
            [GOOD[1][0], GOOD[1][1].transpose(1, 2)],
            r"lses\[1\] has shape \[2, 5, 3\]; expected \[batch, heads, length\] = \[2, 3, 5\]",
        ),
    ],
)
def test_bad_input_is_named(outs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        merge(outs, lses)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_matches_cpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; without one the CUDA kernel is only compiled, never run")
    outs, lses = parts(3, (2, 301, 3, 72), dtype)
    for lse in lses:
        lse[0, 0, :7] = -torch.inf
    want_out, want_lse = merge(outs, lses)
    out, lse = merge([o.cuda() for o in outs], [x.cuda() for x in lses])
    torch.testing.assert_close(out.cpu(), want_out, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse.cpu(), want_lse, rtol=1e-6, atol=1e-6)


def test_a_part_without_keys_may_hold_anything():
    """Beside a part that has keys in the same row: its NaN must not be multiplied by the weight 0."""
    torch.manual_seed(0)
    outs = [torch.randn(1, 5, 2, 64) for _ in range(2)]
    lses = [torch.randn(1, 2, 5) for _ in range(2)]
    lses[1][0, 1, 3] = -torch.inf
    outs[1][0, 3, 1] = torch.nan
    for t in (*outs, *lses):
        t.requires_grad_()
    out, lse = merge(outs, lses)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + lse.sum(), (*outs, *lses)))
    assert torch.equal(out[0, 3, 1], outs[0][0, 3, 1]) and lse[0, 1, 3] == lses[0][0, 1, 3]
    assert out.isfinite().all()
