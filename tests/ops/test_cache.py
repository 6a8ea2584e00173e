"""The feature cache's kernels against their torch twins, in closed form, as operators, and with bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, draw, within
from cache_cases import FORECASTS, UPDATES, double, forecast_arguments, update_arguments
from torch import Tensor

from vdit_fast import ops, reference
from vdit_fast.ops import taylor_weights

ROUNDINGS = ["fast", "eager"]
SHAPES = [(2, 3, 40), (5, 129), (1,), (7,), (1, 1, 16385), (2, 2, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_equals_the_reference(shape: tuple[int, ...]) -> None:
    for variant in UPDATES:
        kwargs = update_arguments(variant, shape)
        want, exact = kwargs | {"factors": kwargs["factors"].clone()}, double(kwargs)
        untouched = kwargs["factors"].clone()
        known = ops.factor_update(**kwargs)
        assert reference.factor_update(**want) == reference.factor_update(**exact) == known
        for i in range(known):
            within(kwargs["factors"][i], want["factors"][i], exact["factors"][i])
        assert torch.equal(kwargs["factors"][known:].nan_to_num(7.0), untouched[known:].nan_to_num(7.0))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 8, 13, 129, 264])
def test_forecast_equals_the_reference(dim: int, dtype: torch.dtype, rounding: str) -> None:
    for variant in FORECASTS:
        kwargs = forecast_arguments(variant, (2, 5, dim), rounding, dtype)
        got = ops.forecast_gate_add(**kwargs)
        within(got, reference.forecast_gate_add(**kwargs), reference.forecast_gate_add(**double(kwargs)))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_eager_rounds_as_a_model_would(dtype: torch.dtype) -> None:
    # One rounding that is missing or too many shows in a fifth of the results or more; sums differ in few.
    for variant in FORECASTS:
        kwargs = forecast_arguments(variant, (2, 5, 1152), "eager", dtype)
        got = ops.forecast_gate_add(**kwargs)
        assert (got == reference.forecast_gate_add(**kwargs)).double().mean() > 0.98, variant
        x, listed = kwargs["x"], isinstance(kwargs["factors"], list)
        for one, gate in zip(*(kwargs[n] if listed else [kwargs[n]] for n in ("factors", "gate")), strict=True):
            branch = ops.forecast(one, weights=kwargs["weights"], dtype=dtype)
            index = None if gate is None else kwargs["index"]
            x = ops.gate_residual(x, branch, gate, index=index, rounding="eager")
        assert (got == x).double().mean() > 0.98, variant


def test_update_in_fp32_is_the_formula_to_the_bit() -> None:
    factors, old = draw(0, 4, 6, 50), draw(0, 4, 6, 50)
    output = draw(1, 6, 50)
    assert ops.factor_update(factors, output, 5, known=4) == 4
    want = [output]
    for i in range(3):
        want.append((want[-1] - old[i]) / 5)
    assert torch.equal(factors, torch.stack(want))


# ---- closed forms of TaylorSeer (features in steps of N = 5); sheet section 1.1, T1a to T1d


def history(feature: Any, order: int, steps: list[int], dtype: torch.dtype = F32) -> tuple[Tensor, int]:
    factors, known = torch.full((order + 1, 4, 33), torch.nan, dtype=dtype), 0
    for before, step in zip([0, *steps], steps, strict=False):
        known = ops.factor_update(factors, feature(step), max(step - before, 1), known=known)
    return factors, known


A, B, C = (draw(seed, 4, 33) for seed in (20, 21, 22))


def test_linear_features_are_forecast_exactly() -> None:
    factors, known = history(lambda s: A + B * s, 1, [0, 5, 10])
    for k in range(1, 8):
        got = ops.forecast(factors, weights=taylor_weights(k, known=known))
        torch.testing.assert_close(got, A + B * (10 + k), rtol=1e-5, atol=1e-4)


def test_quadratic_features_at_order_two() -> None:
    factors, known = history(lambda s: C * s**2, 2, [0, 5, 10])
    for k in range(1, 5):  # every order is divided by the latest distance, so this is not Newton's polynomial
        got = ops.forecast(factors, weights=taylor_weights(k, known=known))
        torch.testing.assert_close(got, C * (10 + k) ** 2 - C * 5 * k, rtol=1e-5, atol=1e-3)


def test_quadratic_features_at_order_one() -> None:
    factors, known = history(lambda s: C * s**2, 1, [0, 5, 10])
    for k in range(1, 5):
        error = ops.forecast(factors, weights=taylor_weights(k, known=known)) - C * (10 + k) ** 2
        torch.testing.assert_close(error, -C * k * (k + 5), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("order", range(5))
def test_one_computed_step_is_repeated(order: int) -> None:
    factors, known = history(lambda s: A + B * s, order, [3])
    assert known == 1
    x = draw(30, 4, 33)
    for k in (1, 4):
        assert torch.equal(ops.forecast(factors, weights=taylor_weights(k, known=known)), A + B * 3)
        assert torch.equal(ops.forecast_gate_add(x, factors, weights=taylor_weights(k, known=known)), x + (A + B * 3))


def test_known_grows_by_one_to_the_order() -> None:
    factors = torch.empty(4, 9)
    known = [0]
    for step in range(6):
        known.append(ops.factor_update(factors, draw(step, 9), 1, known=known[-1]))
    assert known == [0, 1, 2, 3, 4, 4, 4]


def test_weights() -> None:
    assert taylor_weights(3, known=4) == [1, 3, 4.5, 4.5]
    assert taylor_weights(3, known=2, damping=0.5) == [1, 1.5]
    assert taylor_weights(3, known=3, damping=0.0) == [1, 0, 0]
    for arguments in ((1, 0, 1.0), (math.nan, 1, 1.0), (1, 1, math.inf)):
        with pytest.raises(ValueError, match=r"known is 0|expected finite numbers"):
            taylor_weights(arguments[0], known=arguments[1], damping=arguments[2])


# ---- the offset of a span (Δ-DiT): one pass to make it, one to add it


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_span_offset(dtype: torch.dtype) -> None:
    before, after, x = (draw(seed, 2, 7, 24, dtype=dtype, mean=1.0) for seed in (40, 41, 42))
    offset = torch.full((1, 2, 7, 24), torch.nan, dtype=dtype)
    assert ops.factor_update(offset, after, 1, known=0, minus=before) == 1
    assert torch.equal(offset[0], after - before)
    assert torch.equal(ops.forecast_gate_add(x, offset, weights=[1.0]), x + (after - before))
    within(
        ops.forecast_gate_add(before, offset, weights=[1.0]), before + (after - before),
        before.double() + (after - before).double(),
    )  # fmt: skip


def test_minus_equals_the_difference_at_every_order() -> None:
    for order in range(5):
        a, b = (draw(order, order + 1, 5, 40) for _ in range(2))
        output, minus = draw(1, 5, 40), draw(2, 5, 40)
        ops.factor_update(a, output, 3, known=order + 1, minus=minus)
        ops.factor_update(b, output - minus, 3, known=order + 1)
        assert torch.equal(a, b)


# ---- forms, strides, sizes


def test_modules_one_by_one_are_the_whole() -> None:
    for variant in FORECASTS:
        kwargs = forecast_arguments(variant, (2, 5, 72), "eager", BF16)
        if not isinstance(kwargs["factors"], list):
            continue
        x = kwargs["x"]
        for one, gate in zip(kwargs["factors"], kwargs["gate"], strict=True):
            index = None if gate is None else kwargs["index"]
            x = ops.forecast_gate_add(x, one, gate, weights=kwargs["weights"], index=index, rounding="eager")
        assert torch.equal(ops.forecast_gate_add(**kwargs), x)


def test_in_place_and_into_a_destination() -> None:
    for variant in FORECASTS:
        kwargs = forecast_arguments(variant, (2, 5, 40), "eager")
        want = ops.forecast_gate_add(**kwargs)
        joint = torch.full((2, 9, 50), torch.nan, dtype=want.dtype)
        window = joint[:, 2:7, 3:43]
        assert ops.forecast_gate_add(**kwargs, out=window) is window
        assert torch.equal(window, want) and joint.isfinite().sum() == want.numel()
        window.copy_(kwargs["x"])
        ops.forecast_gate_add(**kwargs | {"x": window}, out=window)
        assert torch.equal(window, want) and joint.isfinite().sum() == want.numel()


def test_strides() -> None:
    wide = draw(0, 3, 10, 5, 80)
    turned = wide.transpose(1, 2)
    for view in (wide[::2, 1::3, 2, 8:72], turned[::2, :3, 4, :64], wide[1:], wide[0, 0], wide[:, :4, 1:3]):
        copy = view.contiguous()
        factors = draw(1, 2, *view.shape)
        assert torch.equal(
            ops.forecast_gate_add(view, factors, weights=[1.0, 2.0]),
            ops.forecast_gate_add(copy, factors, weights=[1.0, 2.0]),
        )
        a, b = factors.clone(), factors.clone()
        ops.factor_update(a, view, 2, known=2, minus=2 * copy)
        ops.factor_update(b, copy, 2, known=2, minus=2 * copy)
        assert torch.equal(a, b)
    row = draw(3, 1, 1, 64).expand(2, 3, 64)
    factors = draw(4, 1, 2, 3, 64)
    ops.factor_update(factors, row, 1, known=1)
    assert torch.equal(factors[0], row)


def test_factors_may_lie_apart() -> None:
    arena = torch.full((3, 4, 100), torch.nan)
    factors = arena[:, 1, :60].unflatten(1, (5, 12))
    a, b = draw(0, 5, 12), draw(1, 5, 12)
    known = ops.factor_update(factors, a, 1, known=0)
    known = ops.factor_update(factors, b, 2, known=known)
    assert torch.equal(factors[:2], torch.stack([b, (b - a) / 2]))
    assert arena.isfinite().sum() == 120
    torch.testing.assert_close(ops.forecast(factors, weights=[1.0, 3.0]), b + (b - a) * 1.5)


def test_an_output_that_is_a_factor() -> None:
    factors = draw(0, 3, 4, 40)
    want = factors.clone()
    reference.factor_update(want, factors[1].clone(), 2, known=3)
    ops.factor_update(factors, factors[1], 2, known=3)
    assert torch.equal(factors, want)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    factors = torch.empty(2, *shape)
    assert ops.factor_update(factors, x, 1, known=1) == 2
    assert ops.forecast(factors, weights=[1.0]).shape == shape
    assert ops.forecast_gate_add(x, factors, x[:, :1], weights=[1.0]).shape == shape


def test_results_past_the_caches() -> None:
    # Large enough for stores that go past the caches, with a row that does not begin at a multiple of a vector.
    for dtype in (F32, BF16):
        x = draw(0, 1, (34 << 20) // (dtype.itemsize * 1032), 1032, dtype=dtype)
        factors = torch.empty(2, *x.shape, dtype=dtype)
        known = ops.factor_update(factors, x, 1, known=0)
        known = ops.factor_update(factors, 2 * x, 4, known=known)
        assert torch.equal(factors[0], 2 * x) and torch.equal(factors[1], x / 4)
        gate = draw(1, 1032, dtype=dtype)
        got = ops.forecast_gate_add(x, factors, gate, weights=[1.0, 2.0])
        tail = slice(-5, None)
        want = reference.forecast_gate_add(x[:, tail], factors[:, :, tail], gate, weights=[1.0, 2.0])
        assert torch.equal(got[:, tail], want) or dtype == F32
        torch.testing.assert_close(got[:, tail], want)
        ops.forecast_gate_add(x, factors, gate, weights=[1.0, 2.0], out=x)
        assert torch.equal(x, got)


def test_nan_and_inf_stay_where_they_are() -> None:
    for dtype in (F32, BF16, F16):
        output = draw(0, 9, 40, dtype=dtype)
        output[1, 3], output[2, 39] = torch.nan, torch.inf
        factors = draw(1, 3, 9, 40, dtype=dtype)
        ops.factor_update(factors, output, 5, known=2)
        assert all(torch.equal(f.isfinite(), output.isfinite()) for f in factors)
        assert all(f[2, 39] == torch.inf for f in factors)
        got = ops.forecast_gate_add(draw(2, 9, 40, dtype=dtype), factors, weights=[1.0, 2.0, 2.0])
        assert torch.equal(got.isfinite(), output.isfinite()) and got[1, 3].isnan() and got[2, 39] == torch.inf


def test_a_nan_stays_one_whatever_its_payload() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC00000, -0x7FFFFF], dtype=torch.int32).repeat(11)  # signalling ones too
    factors = torch.empty(1, 33, dtype=BF16)
    ops.factor_update(factors, bits.view(F32), 1.0, known=0)
    assert factors.isnan().all()


def test_threads_and_repeats_change_nothing() -> None:
    kwargs = forecast_arguments(5, (2, 700, 72))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            factors = draw(0, 3, 2, 700, 72)
            ops.factor_update(factors, kwargs["x"].float(), 3, known=3)
            results.append((ops.forecast_gate_add(**kwargs), factors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


# ---- as operators


def test_raw_operators() -> None:
    factors, output = draw(0, 3, 2, 5, 40, dtype=BF16), draw(1, 2, 5, 40, dtype=BF16)
    torch.library.opcheck(torch.ops.vdit_fast.factor_update, (factors, output, output.clone(), 2.0, 2, None))
    kwargs = forecast_arguments(4, (2, 5, 40))
    (b0, g0), (b1, g1) = (g if isinstance(g, tuple) else (None, g) for g in kwargs["gate"])
    torch.library.opcheck(
        torch.ops.vdit_fast.forecast_gate_add,
        (kwargs["x"], kwargs["factors"], [g0, g1], [b0, b1], kwargs["index"], kwargs["weights"], True,
         [None, None], torch.empty_like(kwargs["x"])),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.vdit_fast.forecast_gate_add,
        (None, [factors], [None], [None], None, [1.0], False, [None], torch.empty_like(output)),
    )


def test_gradients_are_refused() -> None:
    x = draw(0, 2, 5, 8).requires_grad_()
    factors = draw(1, 2, 2, 5, 8)
    for call in (
        lambda: ops.factor_update(factors, x, 1, known=1),
        lambda: ops.forecast_gate_add(x, factors, weights=[1.0]),
        lambda: ops.forecast_gate_add(x.detach(), [factors], [x[0, 0]], weights=[1.0]),
        lambda: ops.forecast(factors.clone().requires_grad_(), weights=[1.0]),
    ):
        with pytest.raises(RuntimeError, match=r"has no gradient; call it under torch.no_grad\(\)"):
            call()
        with torch.no_grad():
            call()
    leaf = torch.ones(2, 5, 8, requires_grad=True)
    saved = (2 * leaf)[None]
    loss = saved.square().sum()
    with torch.no_grad():
        ops.factor_update(saved, x, 1, known=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles_to_one_graph() -> None:
    kwargs = forecast_arguments(4, (2, 5, 40))

    def step(x: Tensor, factors: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        known = ops.factor_update(factors, output, 2, known=1)
        y = ops.forecast_gate_add(x, [factors, factors], kwargs["gate"], weights=[1.0, 0.5], index=kwargs["index"])
        return ops.forecast_gate_add(y, factors, weights=[1.0], out=y) + known, ops.forecast(factors, weights=[2.0])

    with torch.no_grad():
        output = draw(3, 2, 5, 40, dtype=kwargs["x"].dtype)
        first, second = (draw(2, 2, 2, 5, 40, dtype=output.dtype) for _ in range(2))
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(kwargs["x"], first, output)
        assert all(map(torch.equal, got, step(kwargs["x"], second, output)))
        assert torch.equal(first, second)


X = torch.randn(2, 6, 24)
TURNED = torch.randn(24, 6, 2).permute(2, 1, 0)
F = torch.randn(3, 2, 6, 24)
ONE = [1.0]
ROW = torch.empty(24).expand(2, 6, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.factor_update(F, X[0], 1, known=0), r"factors has shape \[3, 2, 6, 24\]; expected \[1 to 5, \*\]"),
        (lambda: ops.factor_update(X.expand(6, 2, 6, 24).clone(), X, 1, known=0), r"factors has shape \[6, 2, 6, 24\]"),
        (lambda: ops.factor_update(F, X, 1, known=4), "known is 4; expected 0 to 3"),
        (lambda: ops.factor_update(F, X, 1, known=-1), "known is -1"),
        (lambda: ops.factor_update(F, X, 0, known=1), "distance is 0; expected the steps since the last output"),
        (lambda: ops.factor_update(F, X, math.nan, known=1), "distance is nan"),
        (lambda: ops.factor_update(F, X.double(), 1, known=1), "output is float64"),
        (lambda: ops.factor_update(F.bfloat16(), X.half(), 1, known=1), "output is float16 beside the other 16-bit"),
        (lambda: ops.factor_update(F, X, 1, known=1, minus=X.half()), "minus is float16 but output is float32"),
        (lambda: ops.factor_update(F, X, 1, known=1, minus=X[:, :3]), r"minus has shape \[2, 3, 24\] but output has"),
        (lambda: ops.factor_update(F[..., ::2], X[..., ::2], 1, known=1), "factors has strides between which"),
        (lambda: ops.factor_update(F[:1].expand(3, 2, 6, 24), X, 1, known=1), "factors has strides between which"),
        (lambda: ops.factor_update(F, TURNED, 1, known=1), "output has a layout"),
        (lambda: ops.factor_update(F, F.flatten()[7:295].view(2, 6, 24), 1, known=1), "output overlaps factors"),
        (lambda: ops.forecast_gate_add(X, F, weights=[]), "0 weights; expected 1 to 5"),
        (lambda: ops.forecast_gate_add(X, F, weights=[1.0] * 4), "4 factors are asked for but factors has 3"),
        (lambda: ops.forecast_gate_add(X, F, weights=[1.0, math.inf]), r"weights\[1\] is inf; expected a finite"),
        (lambda: ops.forecast_gate_add(X, [F] * 4, weights=ONE), "4 modules; expected 1 to 3"),
        (lambda: ops.forecast_gate_add(X, [F, F.half()], weights=ONE), r"factors\[1\] is float16 but the first"),
        (lambda: ops.forecast_gate_add(X[0], F[:, 0], X[0, 0], weights=ONE), r"x has shape \[6, 24\]; with a gate"),
        (lambda: ops.forecast_gate_add(X, F, X[:, :3], weights=ONE), "gate has 3 rows for 6 tokens"),
        (lambda: ops.forecast_gate_add(X, [F, F], [None, X[..., :8]], weights=ONE), r"gate\[1\] has shape \[2, 6, 8\]"),
        (
            lambda: ops.forecast_gate_add(X, F, X, weights=ONE, index=torch.full((6,), 6, dtype=torch.int32)),
            "index 6 of token 0 is outside",
        ),
        (lambda: ops.forecast_gate_add(X, F, weights=ONE, index=torch.zeros(6, dtype=torch.int32)), "index without a"),
        (lambda: ops.forecast_gate_add(X, F, weights=ONE, out=X.half()), "out is float16 but x is float32"),
        (lambda: ops.forecast_gate_add(X, F, weights=ONE, out=X[:1]), r"out has shape \[1, 6, 24\] but x has"),
        (lambda: ops.forecast_gate_add(X, F, weights=ONE, out=ROW), "elements of out share"),
        (lambda: ops.forecast_gate_add(X, F, weights=ONE, out=F[0]), "out overlaps factors"),
        (
            lambda: ops.forecast_gate_add(F.flatten()[1:289].view(2, 6, 24), F[1:], weights=ONE, out=F[0]),
            "out overlaps x without being it",
        ),
        (lambda: ops.forecast(F, weights=ONE, out=torch.empty(6, 24)), r"factors has shape \[3, 2, 6, 24\]"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.forecast_gate_add(X, [F, F], X, weights=ONE), "factors is a list of 2 and gate is Tensor"),
        (lambda: ops.forecast_gate_add(X, [F, F], [X], weights=ONE), "and gate is a list of 1"),
        (lambda: ops.forecast_gate_add(X, [], weights=ONE), "factors is a list of 0"),
        (lambda: ops.forecast_gate_add(X, F, X[None], weights=ONE), r"gate has shape \[1, 2, 6, 24\]"),
        (lambda: ops.forecast_gate_add(X, F, weights=ONE, rounding="exact"), "rounding is 'exact'"),
        (lambda: ops.forecast(F, weights=ONE, dtype=BF16, out=X.clone()), "dtype is torch.bfloat16 but out is"),
    ],
)
def test_bad_choices(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_dimensions_that_run_into_each_other_are_refused_where_ranges_meet() -> None:
    buffer = draw(0, 64)
    x = buffer.as_strided((3, 2, 2), (6, 8, 1))  # pairs at 0, 6, 12 and 8, 14, 20: within [0, 22)
    factors = draw(1, 1, 3, 2, 2)
    want = ops.forecast_gate_add(x.contiguous(), factors, weights=[1.0])
    behind = buffer.as_strided((3, 2, 2), (4, 2, 1), 22)
    assert torch.equal(ops.forecast_gate_add(x, factors, weights=[1.0], out=behind), want)
    between = buffer.as_strided((3, 2, 2), (24, 2, 1), 2)  # 2 to 5, 26 to 29, 50 to 53: none of x
    with pytest.raises(RuntimeError, match="out overlaps x without being it"):
        ops.forecast_gate_add(x, factors, weights=[1.0], out=between)


def test_a_gate_in_the_result_is_refused() -> None:
    x = torch.randn(1, 3, 8)
    index = torch.tensor([0, 1, 0], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="out overlaps a gate"):
        ops.forecast_gate_add(x, torch.randn(1, 1, 3, 8), x[:, :2], weights=[1.0], index=index, out=x)
