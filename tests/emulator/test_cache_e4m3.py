"""The feature cache's kernels with factors in e4m3 (csrc/kernels/cache), emulated: to the bit of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, draw, within
from cache_cases import E4M3, FORECASTS, UPDATES, coded, coded_forecast, coded_update, same_codes, values
from emulator_cache import factor_update, forecast_gate_add
from torch import Tensor

from emulator import LAZY_REVERSE, RANDOMS, EmulatorError, Policy, stats
from vdit_fast import reference


def check_update(kwargs: dict[str, Any], policy: Policy) -> None:
    want = kwargs | {name: kwargs[name].clone() for name in ("factors", "scales")}
    assert factor_update(**kwargs, policy=policy) == reference.factor_update(**want)
    assert same_codes(kwargs["factors"], want["factors"])
    torch.testing.assert_close(kwargs["scales"], want["scales"], rtol=0, atol=0, equal_nan=True)


def check_forecast(kwargs: dict[str, Any], exact: dict[str, Any], policy: Policy) -> None:
    got, want = forecast_gate_add(**kwargs, policy=policy), reference.forecast_gate_add(**kwargs)
    within(got, want, reference.forecast_gate_add(**exact))
    if kwargs["rounding"] == "eager" and got.dtype != F32 and got.numel() > 4000:
        assert (got == want).double().mean() > 0.98


@pytest.mark.parametrize("shape", [(2, 3, 40), (7, 13), (3,), (2, 9, 96), (3, 264), (2, 300)], ids=str)
def test_updates(policy: Policy, shape: tuple[int, ...]) -> None:
    for variant in UPDATES:
        check_update(coded_update(variant, shape), policy)


@pytest.mark.parametrize("dim", [1, 257, 2048, 2056, 4096, 4104, 5121, 8200, 16384])
def test_every_number_of_pieces(dim: int) -> None:
    # From one lane to a CTA per row; from one piece per thread over two to four.
    for variant in (1, 6, 14):
        check_update(coded_update(variant, (2, dim)), RANDOMS[variant % 3])


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dim", [8, 13, 264])
def test_forecasts(policy: Policy, dim: int, rounding: str) -> None:
    for variant in FORECASTS:
        check_forecast(*coded_forecast(variant, (2, 4, dim), rounding), policy)


def test_roundings() -> None:
    for variant in FORECASTS:
        check_forecast(*coded_forecast(variant, (1, 8, 520), "eager", (BF16, F16)[variant % 2]), RANDOMS[0])


def test_rows_of_a_larger_tensor() -> None:
    # Batch items that do not follow each other.
    kwargs = coded_update(4, (2, 3, 64)) | {"known": 2}
    for name in ("output", "minus"):
        kwargs[name] = draw(5, 2, 7, 72, dtype=BF16)[:, 2:5, :64]
        kwargs["factors"], kwargs["scales"] = coded(draw(0, 5, 2, 3, 64))
        check_update(kwargs, RANDOMS[0])


def test_misaligned_rows() -> None:
    for name, offset in (("output", 1), ("output", 4), ("minus", 2), ("factors", 1), ("factors", 4), ("stride", 4)):
        kwargs = coded_update(4, (2, 3, 64)) | {"known": 4}
        kwargs["factors"], kwargs["scales"] = coded(draw(0, 5, 2, 3, 64))
        if name in ("factors", "stride"):  # the first factor aligned, or not
            first = offset if name == "factors" else 0
            apart = torch.zeros(5, 384 + offset, dtype=torch.uint8)[:, first : first + 384].unflatten(1, (2, 3, 64))
            apart.copy_(kwargs["factors"].view(torch.uint8))
            kwargs["factors"] = apart.view(E4M3)
        else:
            wide = kwargs["output"].new_zeros(2, 3, 64 + offset)
            wide[..., offset:] = draw(7, 2, 3, 64)
            kwargs[name] = wide[..., offset:]
        check_update(kwargs, RANDOMS[0])
    kwargs, exact = coded_forecast(4, (2, 3, 64))
    module = kwargs["factors"][1]
    apart = torch.zeros(len(module), 388, dtype=torch.uint8)[:, 4:].unflatten(1, (2, 3, 64))
    apart.copy_(module.view(torch.uint8))
    check_forecast(kwargs | {"factors": [kwargs["factors"][0], apart.view(E4M3)]}, exact, RANDOMS[0])


def test_every_byte_moves_once() -> None:
    """Codes in 8-byte accesses, one a piece; a scale once per row and factor written, and read by whoever needs it: the
    threads of a row, which find it in L1."""
    rows, dim = 6, 40
    pieces = rows * dim // 8
    for dtype in (F32, BF16):
        wide = dtype.itemsize * 8 // 16
        for order in range(5):
            for known in range(order + 2):
                minus = draw(3, 2, 3, dim, dtype=dtype) if known % 2 else None
                codes, scales = coded(draw(0, order + 1, 2, 3, dim))
                stats("cache")
                written = factor_update(
                    codes, draw(1, 2, 3, dim, dtype=dtype), 2.0, known=known, minus=minus, scales=scales
                )
                moved = stats("cache")
                assert moved.ldg128 == (1 + (minus is not None)) * wide * pieces and moved.stg128 == 0
                assert moved.ldg64 == (written - 1) * pieces and moved.stg64 == written * pieces
                assert moved.stg32 == written * rows
                assert moved.ldg32 == (written - 1) * rows * 8  # 5 pieces are 8 lanes
        for modules in range(1, 4):
            for terms in range(1, 6):
                held = [coded(draw(j, 5, 2, 3, dim)) for j in range(modules)]
                stats("cache")
                forecast_gate_add(
                    draw(2, 2, 3, dim, dtype=dtype), [codes for codes, _ in held], weights=[1.0] * terms,
                    scales=[scales for _, scales in held],
                )  # fmt: skip
                moved = stats("cache")
                assert moved.ldg128 == moved.stg128 == wide * pieces
                assert moved.ldg64 == moved.ldg32 == modules * terms * pieces and moved.stg64 == moved.stg32 == 0


def test_in_place(policy: Policy) -> None:
    for variant in FORECASTS:
        kwargs, _ = coded_forecast(variant, (2, 3, 40), "eager")
        want, x = forecast_gate_add(**kwargs), kwargs["x"].clone()
        forecast_gate_add(**kwargs | {"x": x}, out=x, policy=policy)
        assert torch.equal(x, want)


def kept(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = torch.zeros(1, *x.shape, dtype=E4M3), torch.zeros(1, *x.shape[:-1])
    factor_update(codes, x, 1.0, known=0, scales=scales, policy=LAZY_REVERSE)
    return codes[0], scales[0]


def test_edges() -> None:
    most, tiny = torch.finfo(F32).max, torch.finfo(F32).tiny
    x = torch.zeros(8, 320)
    x[0, :6] = torch.tensor([most, -most, 1.0, 3.3e38, torch.inf, torch.nan])
    x[1, :3] = torch.tensor([1e-45, tiny, -tiny])
    x[2] = -0.0
    x[3, 300], x[3, 7] = torch.inf, 2.0
    x[4, 300], x[4, 7] = torch.nan, 2.0
    x[5] = torch.nan
    x[6, 319] = 448.0
    x[7, 0] = 448.0001
    codes, scales = kept(x)
    want, want_scales = reference.cache.quantised(x)
    assert same_codes(codes, want) and torch.equal(scales, want_scales)
    assert torch.equal(values(codes, scales).isfinite(), x.isfinite())
    assert values(codes, scales)[0, 0] == 240 * 2.0**120 and scales[2] == scales[5] == 2.0**-126
    assert scales[6] == 1.0 and scales[7] == 2.0


def test_nothing_to_do_and_too_much() -> None:
    assert (
        factor_update(torch.empty(2, 0, 8, dtype=E4M3), torch.empty(0, 8), 1.0, known=1, scales=torch.ones(2, 0)) == 2
    )
    with pytest.raises(EmulatorError, match="error code 1"):
        factor_update(torch.zeros(1, 2, 16385, dtype=E4M3), torch.ones(2, 16385), 1.0, known=0, scales=torch.ones(1, 2))
