"""The feature cache's kernels with factors in e4m3: to the bit, the error of what is kept, edges, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, draw, within
from cache_cases import E4M3, FORECASTS, UPDATES, coded, coded_forecast, coded_update, same_codes, values
from torch import Tensor

from vdit_fast import ops, reference
from vdit_fast.ops import taylor_weights

SHAPES = [(2, 3, 40), (5, 129), (1,), (7,), (1, 3, 1), (3, 16384), (2, 2, 2, 3, 4), (2, 3, 257)]


def empty(order: int, *shape: int) -> tuple[Tensor, Tensor]:
    """A buffer that holds nothing: NaN, so that reading it shows."""
    codes = torch.full((order + 1, *shape), 0x7F, dtype=torch.uint8).view(E4M3)
    return codes, torch.full((order + 1, *shape[:-1]), torch.nan)


def stored(x: Tensor, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """x as codes and scales of a first factor."""
    codes, scales = empty(0, *x.shape)
    assert ops.factor_update(codes, x, distance, known=0, scales=scales) == 1
    return codes[0], scales[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_equals_the_reference(shape: tuple[int, ...]) -> None:
    for variant in UPDATES:
        kwargs = coded_update(variant, shape)
        want = kwargs | {name: kwargs[name].clone() for name in ("factors", "scales")}
        assert ops.factor_update(**kwargs) == reference.factor_update(**want)
        assert same_codes(kwargs["factors"], want["factors"]), variant
        torch.testing.assert_close(kwargs["scales"], want["scales"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 8, 13, 129, 264])
def test_forecast_equals_the_reference(dim: int, dtype: torch.dtype, rounding: str) -> None:
    for variant in FORECASTS:
        kwargs, exact = coded_forecast(variant, (2, 5, dim), rounding, dtype)
        got, want = ops.forecast_gate_add(**kwargs), reference.forecast_gate_add(**kwargs)
        within(got, want, reference.forecast_gate_add(**exact))
        if rounding == "eager" and dtype != F32 and got.numel() > 1000:
            assert (got == want).double().mean() > 0.98, variant
        x = kwargs["x"].clone()
        assert torch.equal(ops.forecast_gate_add(**kwargs | {"x": x}, out=x), got)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_forecast_alone(dtype: torch.dtype) -> None:
    for shape in ((3, 5, 7), (9,), (2, 2, 3, 4, 40)):
        for terms in range(1, 6):
            codes, scales = coded(draw(terms, 5, *shape), terms)
            weights = [1.0, 0.5, -2.0, 0.25, 3.0][:terms]
            got = ops.forecast(codes, weights=weights, dtype=dtype, scales=scales)
            want = reference.forecast(codes, weights=weights, dtype=dtype, scales=scales)
            within(got, want, reference.forecast(values(codes, scales), weights=weights))


# ---- what is kept: closed forms


def bound(x: Tensor, scales: Tensor) -> Tensor:
    """Most that a number may be off: half a step of e4m3 around it, which is 2⁻⁴ of the power of two below it and 2⁻¹⁰
    of the scale among subnormal codes."""
    below = x.abs().frexp()[1].double().sub(1).exp2()
    return torch.maximum(below * 2.0**-4, scales[..., None].double() * 2.0**-10)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_error_of_what_is_kept(dtype: torch.dtype) -> None:
    """|error| ≤ max(2⁻⁴ |x|, 2⁻¹⁰ m / 224), and never more than 2⁻⁴ m, m the largest magnitude of the row."""
    x = draw(0, 200, 3, 72)
    x *= torch.linspace(-14, 8, 200).exp2()[:, None, None] * (draw(1, 200, 3, 72) * 4).exp2()
    x = x.clamp(-60000, 60000).to(dtype)
    codes, scales = stored(x)
    most = x.double().abs().amax(-1)
    assert torch.equal(scales.frexp()[0], torch.full_like(scales, 0.5))  # powers of two
    assert (most <= 448 * scales.double()).all() and (most > 224 * scales.double()).all()
    error = (values(codes, scales) - x.double()).abs()
    assert (error <= bound(x.double(), scales)).all()
    assert (error <= torch.maximum(x.double().abs() / 16, most[..., None] * 2.0**-10 / 224)).all()
    assert (error <= most[..., None] / 16).all()
    assert error.max() > 0 and (codes.float() == 0).double().mean() < 0.5  # not a bound of nothing


def test_every_code_is_kept_as_it_is() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    for power in (-100, -7, 0, 3, 100):
        x = codes * 2.0**power
        kept, scales = stored(x[None])
        assert scales.item() == 2.0**power
        assert same_codes(kept[0], codes.to(E4M3))


def test_halves_go_to_the_even_code() -> None:
    finite = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    halves = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.tensor([448.0])])
    kept, _ = stored(halves[None])
    assert (kept[0, :-1].view(torch.uint8) % 2 == 0).all()


def test_factors_are_those_of_the_kept_ones() -> None:
    """F_1 is the difference to what the old F_0 stands for, not to what it was made of."""
    a, b = draw(0, 4, 64), draw(1, 4, 64)
    codes, scales = empty(1, 4, 64)
    ops.factor_update(codes, a, 1, known=0, scales=scales)
    first = values(codes, scales)[0].float()
    ops.factor_update(codes, b, 4, known=1, scales=scales)
    want, want_scales = reference.cache.quantised((b - first) / 4)
    assert same_codes(codes[1], want) and torch.equal(scales[1], want_scales)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_linear_features_within_the_error_of_their_factors(order: int) -> None:
    a, b = draw(20, 4, 33), draw(21, 4, 33)
    codes, scales = empty(order, 4, 33)
    known, before = 0, 0
    for step in (0, 5, 10):
        known = ops.factor_update(codes, a + b * step, max(step - before, 1), known=known, scales=scales)
        before = step
    got = ops.forecast(codes, weights=taylor_weights(2, known=known), dtype=F32, scales=scales)
    truth = (a + b * 10).double() + (b.double() * 2 if order else 0)
    largest = [x.double().abs().amax(-1, keepdim=True) for x in (a + b * 10, a + b * 5, *values(codes, scales)[1:])]
    # A factor is off by 2⁻⁴ of its row's largest at most; F_1 has the old F_0's error / 5 besides, and F_2 should be 0.
    allowed = largest[0] / 16
    allowed += 2 * (largest[1] / 16 / 5 + largest[2] / 15) if order else 0
    allowed += 2 * largest[3] if order > 1 else 0
    assert ((got.double() - truth).abs() <= 1.0001 * allowed).all()


# ---- edges


def test_edges_rows_of_zeros() -> None:
    x = draw(0, 4, 40)
    x[1] = 0.0
    x[2] = -0.0
    codes, scales = stored(x)
    assert scales[1] == scales[2] == 2.0**-126
    assert torch.equal(values(codes, scales)[1:3].float(), x[1:3])
    assert torch.equal(values(codes, scales)[2].signbit(), x[2].signbit())
    added = ops.forecast_gate_add(x, codes[None], weights=[3.0], scales=scales[None])
    assert torch.equal(added[1], x[1]) and added.isfinite().all()


def test_edges_tiny_and_huge_numbers() -> None:
    tiny, most = torch.finfo(F32).tiny, torch.finfo(F32).max
    x = torch.tensor([[1e-45, tiny, -tiny, 0.0], [most, -most, 1.0, 0.0], [most / 1.0625, 3.2e38, -3.3e38, 0.0]])
    codes, scales = stored(x.repeat(1, 5))
    kept = values(codes, scales)
    assert scales[0] == 2.0**-126 and scales[1] == 2.0**120
    assert kept.float().isfinite().all()  # 256 · 2¹²⁰ would be infinity
    assert ((kept - x.repeat(1, 5)).abs() <= x.abs().amax(-1, keepdim=True).double() / 16 + 2.0**-136).all()
    assert kept[0, 1] == tiny and kept[1, 0] == 240 * 2.0**120
    x[1, 2:] = torch.tensor([torch.inf, torch.nan])  # beside numbers that are kept in range
    codes, scales = stored(x.repeat(1, 5))
    assert torch.equal(values(codes, scales).isnan(), ~x.repeat(1, 5).isfinite()) and scales[1] == 2.0**120


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_not_finite(dtype: torch.dtype) -> None:
    """What is not finite is NaN in its factor and in forecasts, and its neighbours keep their precision."""
    output = draw(0, 9, 40, dtype=dtype)
    clean = output.clone()
    output[1, 3], output[2, 39], output[3, 0] = torch.nan, torch.inf, -torch.inf
    output[4] = torch.nan
    clean[[1, 2, 3], [3, 39, 0]] = 0.0
    clean[4] = 0.0
    pairs = []
    for x in (output, clean):
        codes, scales = empty(2, 9, 40)
        for known in range(3):
            ops.factor_update(codes, x * (1 + known), 5.0, known=known, scales=scales)
        pairs.append((codes, scales))
    (codes, scales), (clean_codes, clean_scales) = pairs
    finite = output.isfinite()
    assert torch.equal(scales, clean_scales)
    for factor, other in zip(codes, clean_codes, strict=True):
        assert torch.equal(factor.float().isnan(), ~finite)
        assert torch.equal(factor.view(torch.uint8)[finite], other.view(torch.uint8)[finite])
    got = ops.forecast_gate_add(draw(2, 9, 40, dtype=dtype), codes, weights=[1.0, 2.0, 2.0], scales=scales)
    assert torch.equal(got.isfinite(), finite)


def test_edges_strides_and_layouts() -> None:
    wide = draw(0, 3, 10, 5, 80)
    turned = wide.transpose(1, 2)
    for view in (wide[::2, 1::3, 2, 8:72], turned[::2, :3, 4, :64], wide[1:], wide[0, 0]):
        results = []
        for x in (view, view.contiguous()):
            codes, scales = coded(draw(1, 2, *x.shape))
            ops.factor_update(codes, x, 2, known=2, minus=2 * x.contiguous(), scales=scales)
            results.append((codes, scales, ops.forecast_gate_add(x, codes, weights=[1.0, 2.0], scales=scales)))
        assert same_codes(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])
    arena, held = torch.full((3, 100), 0x7F, dtype=torch.uint8).view(E4M3), torch.full((3, 9), torch.nan)
    codes, scales = arena[:, 13:73].unflatten(1, (5, 12)), held[:, 2:7]
    x = draw(0, 5, 12)
    known = ops.factor_update(codes, x, 1, known=0, scales=scales)
    ops.factor_update(codes, 3 * x, 2, known=known, scales=scales)
    want, want_scales = coded(torch.zeros(3, 5, 12))
    for k in range(2):
        reference.factor_update(want, (x, 3 * x)[k], (1, 2)[k], known=k, scales=want_scales)
    assert same_codes(codes[:2], want[:2]) and torch.equal(scales[:2], want_scales[:2])
    assert held.isfinite().sum() == 10 and arena.float().isfinite().sum() == 120


REFUSED = {
    "factors is float8_e4m3fn without scales": lambda of: of.factor_update(F.clone(), X, 1, known=0),
    "factors is float8_e4m3fn without scales; pass a": lambda of: of.forecast(F, weights=[1.0], dtype=F32),
    r"factors\[1\] is float8_e4m3fn without scales\[1\]": lambda of: of.forecast_gate_add(X, [F, F], **MIXED),
    "scales beside factors in float32; only those in": lambda of: of.factor_update(F.float(), X, 1, known=0, scales=S),
    "scales beside factors in bfloat16": lambda of: of.forecast(F.bfloat16(), weights=[1.0], scales=S),
    r"scales has shape \[2, 2, 6\]; expected that of factors, \[3, 2, 6, 24\]": lambda of: of.factor_update(
        F.clone(), X, 1, known=0, scales=S[:2]
    ),
    r"scales has shape \[3, 2, 6, 1\]": lambda of: of.forecast_gate_add(X, F, weights=[1.0], scales=S[..., None]),
    r"scales has shape \[2\]; expected that of factors, \[2\]": lambda of: of.factor_update(
        torch.empty(2, dtype=E4M3), X[0, 0, 0], 1, known=0, scales=S[:2, 0, 0]
    ),
    "scales is float16; expected float32": lambda of: of.forecast(F, weights=[1.0], dtype=F32, scales=S.half()),
    "factors has rows of 16385 elements; at most 16384 share a scale": lambda of: of.factor_update(
        LONG, LONG[0].float(), 1, known=0, scales=LONG[..., 0].float()
    ),
    "rows of 16385": lambda of: of.forecast(LONG, weights=[1.0], dtype=F32, scales=LONG[..., 0].float()),
    r"factors\[1\] is float16 but the first module's": lambda of: of.forecast_gate_add(X, [F, F.half()], **MIXED),
    "output is float8_e4m3fn; convert it": lambda of: of.factor_update(F.clone(), X.to(E4M3), 1, known=0, scales=S),
    "minus is float8_e4m3fn; convert it": lambda of: of.factor_update(
        F.clone(), X, 1, known=0, minus=X.to(E4M3), scales=S
    ),
    "is float8_e4m3fn; convert it": lambda of: of.forecast_gate_add(X.to(E4M3), F, weights=[1.0], scales=S),
    "convert it": lambda of: of.factor_update(F.view(torch.float8_e5m2), X, 1, known=0),
    "factors are torch.float8_e4m3fn, which no": lambda of: of.forecast(F, weights=[1.0], scales=S),
    "dtype is torch.float8_e4m3fn; expected": lambda of: of.forecast(F, weights=[1.0], dtype=E4M3, scales=S),
    "2 modules but 1 scales": lambda of: of.forecast_gate_add(X, [F, F], weights=[1.0], scales=S),
}


@pytest.mark.parametrize("of", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("message", REFUSED)
def test_the_reference_refuses_what_the_operators_do(message: str, of: Any) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        REFUSED[message](of)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
def test_edges_empty(shape: tuple[int, ...]) -> None:
    x, codes, scales = torch.empty(shape), torch.empty(2, *shape, dtype=E4M3), torch.empty(2, *shape[:-1])
    scales.fill_(3.0)
    for of in (ops, reference):
        assert of.factor_update(codes, x, 1, known=1, scales=scales) == 2
        assert of.forecast(codes, weights=[1.0], dtype=F32, scales=scales).shape == shape
        assert of.forecast_gate_add(x, codes, x[:, :1], weights=[1.0], scales=scales).shape == shape
    assert (scales == 3.0).all()
    kept, of_rows = reference.cache.quantised(x)
    assert kept.shape == shape and kept.dtype == E4M3 and torch.equal(of_rows, torch.full(shape[:-1], 2.0**-126))


def test_threads_and_repeats_change_nothing() -> None:
    kwargs, _ = coded_forecast(5, (2, 700, 72))
    x, threads, results = draw(3, 2, 700, 72), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            codes, scales = coded(draw(0, 3, 2, 700, 72))
            ops.factor_update(codes, x, 3, known=3, scales=scales)
            results.append((ops.forecast_gate_add(**kwargs), codes.view(torch.uint8), scales))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


# ---- as operators


CHECKS = ("test_autograd_registration", "test_faketensor")  # the others compare, which torch cannot in float8


def test_raw_operators() -> None:
    codes, scales = coded(draw(0, 3, 2, 5, 40))
    x = draw(1, 2, 5, 40, dtype=BF16)
    update = torch.ops.vdit_fast.factor_update
    torch.library.opcheck(update, (codes, x, x.clone(), 2.0, 2, scales), test_utils=CHECKS)
    torch.library.opcheck(
        torch.ops.vdit_fast.forecast_gate_add,
        (x, [codes, codes], [None, None], [None, None], None, [1.0, 0.5], True, [scales, scales], torch.empty_like(x)),
        test_utils=CHECKS,
    )


def test_compiles_to_one_graph() -> None:
    def step(x: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        known = ops.factor_update(codes, x, 2, known=1, scales=scales)
        y = ops.forecast_gate_add(x, [codes, codes], weights=[1.0, 0.5], scales=[scales, scales])
        return y + known, ops.forecast(codes, weights=[2.0], dtype=F32, scales=scales)

    with torch.no_grad():
        x = draw(3, 2, 5, 40)
        first, second = (coded(draw(2, 2, 2, 5, 40)) for _ in range(2))
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *first)
        assert all(map(torch.equal, got, step(x, *second)))
        assert same_codes(first[0], second[0]) and torch.equal(first[1], second[1])


def test_gradients_are_refused() -> None:
    x, (codes, scales) = draw(0, 2, 5, 8).requires_grad_(), coded(draw(1, 2, 2, 5, 8))
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.factor_update(codes, x, 1, known=1, scales=scales)
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.forecast_gate_add(x.detach(), codes, weights=[1.0], scales=scales.clone().requires_grad_())


X = draw(0, 2, 6, 24)
F, S = coded(draw(1, 3, 2, 6, 24))
LONG = torch.zeros(1, 2, 16385, dtype=E4M3)
BOTH = torch.zeros(320)
BYTES = BOTH.view(E4M3)[:864].view(3, 2, 6, 24)  # codes in the memory of BOTH[:216]
OUT, INTO = BOTH[:288].view(2, 6, 24), BOTH[280:316].view(3, 2, 6)  # a result, and scales in its memory
MIXED = {"weights": [1.0], "scales": [S, None]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.factor_update(F, X, 1, known=0), "factors is float8_e4m3fn without scales; pass a float32"),
        (lambda: ops.forecast_gate_add(X, F, weights=[1.0]), "factors is float8_e4m3fn without scales"),
        (lambda: ops.factor_update(F.float(), X, 1, known=0, scales=S), "scales beside factors in float32; only"),
        (lambda: ops.factor_update(F, X, 1, known=0, scales=S[:2]), r"scales has shape \[2, 2, 6\]; expected that of"),
        (lambda: ops.factor_update(F, X, 1, known=0, scales=S[..., None]), r"scales has shape \[3, 2, 6, 1\]"),
        (lambda: ops.factor_update(F, X, 1, known=0, scales=S.half()), "scales is float16; expected float32"),
        (lambda: ops.factor_update(F, X, 1, known=0, scales=S.mT), r"scales has shape \[3, 6, 2\]"),
        (lambda: ops.factor_update(F, X, 1, known=0, scales=S[:1].expand(3, 2, 6)), "scales has strides between which"),
        (
            lambda: ops.factor_update(F, OUT, 1, known=0, scales=INTO),
            "output overlaps scales",
        ),
        (
            lambda: ops.factor_update(F, X, 1, known=0, minus=OUT, scales=INTO),
            "minus overlaps scales",
        ),
        (
            lambda: ops.factor_update(BYTES, X, 1, known=0, scales=BOTH[200:236].view(3, 2, 6)),
            "scales overlaps factors; pass memory of its own",
        ),
        (lambda: ops.forecast(F, weights=[1.0], out=OUT, scales=INTO), "out overlaps scales"),
        (lambda: ops.forecast_gate_add(X, F, weights=[1.0], out=OUT, scales=INTO), "out overlaps scales"),
        (
            lambda: ops.forecast_gate_add(X, [F, F], weights=[1.0], out=OUT, scales=[S, INTO]),
            r"out overlaps scales\[1\]",
        ),
        (lambda: ops.forecast_gate_add(X, BYTES, weights=[1.0], out=OUT, scales=S), "out overlaps factors"),
        (lambda: ops.factor_update(LONG, LONG[0].float(), 1, known=0, scales=LONG[..., 0].float()), "rows of 16385"),
        (lambda: ops.factor_update(F, X.to(E4M3), 1, known=0, scales=S), "output is float8_e4m3fn; convert it"),
        (lambda: ops.forecast_gate_add(X, [F, F.half()], **MIXED), r"factors\[1\] is float16 but the first"),
        (lambda: ops.forecast_gate_add(X, [F, F], **MIXED), r"factors\[1\] is float8_e4m3fn without scales\[1\]"),
        (lambda: ops.factor_update(F.view(torch.float8_e5m2), X, 1, known=0), "factors is float8_e5m2; convert it"),
        (
            lambda: ops.factor_update(torch.empty(2, dtype=E4M3), X[0, 0, 0], 1, known=0, scales=S[:2, 0, 0]),
            r"scales has shape \[2\]; expected that of factors, \[2\], without the last dimension",
        ),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.forecast(F, weights=[1.0], scales=S), "factors are torch.float8_e4m3fn, which no result has"),
        (lambda: ops.forecast_gate_add(X, [F, F], weights=[1.0], scales=S), "2 modules but 1 scales"),
    ],
)
def test_bad_choices(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_may_be_large() -> None:
    """A weight times a scale is not formed: it might overflow where the product with the code does not."""
    x = torch.zeros(1, 40)
    x[0, 0] = 3e38
    codes, scales = stored(x)
    got = ops.forecast(codes[None], weights=[1e6], dtype=F32, scales=scales[None])
    assert got[0, 0] == math.inf and (got[0, 1:] == 0).all()
