"""The feature cache's kernels (csrc/kernels/cache), emulated: against fp64, and rounded where the reference rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, draw, within
from cache_cases import FORECASTS, UPDATES, double, forecast_arguments, update_arguments
from emulator_cache import factor_update, forecast_gate_add
from torch import Tensor

from emulator import RANDOMS, EmulatorError, Policy, stats
from vdit_fast import reference


def check_update(kwargs: dict[str, Any], policy: Policy, **extra: int) -> None:
    want, exact, untouched = kwargs | {"factors": kwargs["factors"].clone()}, double(kwargs), kwargs["factors"].clone()
    known = factor_update(**kwargs, **extra, policy=policy)
    assert reference.factor_update(**want) == reference.factor_update(**exact) == known
    for i in range(known):
        within(kwargs["factors"][i], want["factors"][i], exact["factors"][i])
    assert torch.equal(kwargs["factors"][known:].isnan(), untouched[known:].isnan())


def check_forecast(kwargs: dict[str, Any], policy: Policy, out: Tensor | None = None, **extra: int) -> None:
    want, exact = (reference.forecast_gate_add(**args) for args in (kwargs, double(kwargs)))
    got = forecast_gate_add(**kwargs, **extra, out=out, policy=policy)
    within(got, want, exact)
    if kwargs["rounding"] == "eager" and got.dtype != F32 and got.numel() > 4000:
        assert (got == want).double().mean() > 0.98


@pytest.mark.parametrize("shape", [(2, 3, 40), (7, 13), (3,)], ids=str)
def test_updates(policy: Policy, shape: tuple[int, ...]) -> None:
    for variant in UPDATES:
        check_update(update_arguments(variant, shape), policy)


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dim", [8, 13, 264])
def test_forecasts(policy: Policy, dim: int, rounding: str) -> None:
    for variant in FORECASTS:
        check_forecast(forecast_arguments(variant, (2, 4, dim), rounding), policy)


@pytest.mark.parametrize("rounding", ["fast", "eager"])
def test_roundings(rounding: str) -> None:
    for variant in FORECASTS:
        check_forecast(forecast_arguments(variant, (1, 8, 520), rounding, (BF16, F16)[variant % 2]), RANDOMS[0])


@pytest.mark.parametrize("numel", [1, 7, 8, 63, 64, 65, 200, 2051])
def test_rows_of_which_the_last_is_cut(numel: int) -> None:
    for variant in (1, 3, 8, 14):
        check_update(update_arguments(variant, (numel,)), RANDOMS[0], flat_row=64)
        kwargs = forecast_arguments(variant, (1, 1, numel)) | {"gate": None, "index": None}
        kwargs["factors"] = kwargs["factors"][0] if isinstance(kwargs["factors"], list) else kwargs["factors"]
        check_forecast(kwargs, RANDOMS[1], flat_row=64)


def moved(t: Tensor, offset: int) -> Tensor:
    """The same values in rows that begin or step beside 16 bytes."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + offset), torch.nan)
    wide[..., offset:] = t
    return wide[..., offset:]


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_rows(offset: int) -> None:
    # Each tensor by itself; a factor is contiguous, so those of a module are moved together.
    update = update_arguments(4, (2, 3, 64)) | {"known": 4}
    update["factors"] = draw(0, 5, 2, 3, 64, dtype=BF16)
    for name in ("output", "minus"):
        check_update(update | {name: moved(update[name], offset), "factors": update["factors"].clone()}, RANDOMS[0])
    apart = draw(0, 5, 384 + offset, dtype=BF16)[:, offset:].unflatten(1, (2, 3, 64))
    check_update(update | {"factors": apart}, RANDOMS[0])
    kwargs = forecast_arguments(4, (2, 3, 64))
    base, rows = kwargs["gate"][1]
    module = kwargs["factors"][1]
    apart = module.new_full((len(module), 384 + offset), torch.nan)[:, offset:].unflatten(1, (2, 3, 64))
    apart.copy_(module)
    for change in (
        {"x": moved(kwargs["x"], offset)},
        {"factors": [kwargs["factors"][0], apart]},
        {"gate": [kwargs["gate"][0], (moved(base, offset), rows)]},
        {"gate": [kwargs["gate"][0], (base, moved(rows, offset))]},
    ):
        check_forecast(kwargs | change, RANDOMS[0])
    out = moved(torch.full((2, 3, 64), torch.nan, dtype=kwargs["x"].dtype), offset)
    forecast_gate_add(**kwargs, out=out, policy=RANDOMS[0])
    assert torch.equal(out, forecast_gate_add(**kwargs))


def test_every_byte_moves_once() -> None:
    # In 16-byte accesses, which are all there are; the rows of gates, which L1 holds, are read once per piece.
    elements = 2 * 3 * 40
    for dtype in (F32, BF16):
        each = elements * dtype.itemsize // 16
        for order in range(5):
            for known in range(order + 2):
                minus = draw(3, 2, 3, 40, dtype=dtype) if known % 2 else None
                factors = draw(0, order + 1, 2, 3, 40, dtype=dtype)
                stats("cache")
                written = factor_update(factors, draw(1, 2, 3, 40, dtype=dtype), 2.0, known=known, minus=minus)
                moved = stats("cache")
                assert moved.ldg128 == (1 + (minus is not None) + written - 1) * each
                assert moved.stg128 == written * each
        for modules in range(1, 4):
            for terms in range(1, 6):
                held = [draw(j, 5, 2, 3, 40, dtype=dtype) for j in range(modules)]
                gate = draw(4, 1, 1, 40)
                stats("cache")
                forecast_gate_add(
                    draw(2, 2, 3, 40, dtype=dtype), held, [gate, *[None] * (modules - 1)], weights=[1.0] * terms
                )
                moved = stats("cache")
                assert moved.ldg128 == (1 + modules * terms) * each + elements * 4 // 16
                assert moved.stg128 == each


def test_rows_narrower_than_their_strides() -> None:
    # The strides of x and out alone do not tell that the factor's rows are not made of whole pieces.
    factors, wide = draw(0, 1, 2, 3, 13), draw(1, 2, 3, 16)
    x, out = wide[..., :13], torch.full((2, 3, 16), torch.nan)[..., :13]
    forecast_gate_add(x, factors, weights=[1.0], out=out, policy=RANDOMS[0])
    assert torch.equal(out, x + factors[0])


def test_in_place(policy: Policy) -> None:
    for variant in FORECASTS:
        kwargs = forecast_arguments(variant, (2, 3, 40), "eager")
        want = forecast_gate_add(**kwargs)
        x = kwargs["x"].clone()
        forecast_gate_add(**kwargs | {"x": x}, out=x, policy=policy)
        assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_forecast_alone(dtype: torch.dtype) -> None:
    for terms in range(1, 6):
        factors = draw(terms, 5, 3, 5, 7, dtype=BF16 if dtype == F32 else dtype)
        weights = [-1.5, 0.5, -2.0, 0.25, 3.0][:terms]
        out = forecast_gate_add(None, factors, weights=weights, out=torch.full((3, 5, 7), torch.nan, dtype=dtype))
        want, exact = (reference.forecast(f, weights=weights, dtype=dtype) for f in (factors, factors.double()))
        within(out, want, exact)


@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1, -(2**31)])
def test_an_index_outside_the_table_reads_its_last_row(row: int) -> None:
    kwargs = forecast_arguments(7, (2, 4, 40))
    index = torch.full((4,), row, dtype=torch.int32)
    got, want = (forecast_gate_add(**kwargs | {"index": i}) for i in (index, torch.full_like(index, 2)))
    assert torch.equal(got, want)


def test_nan_and_inf_stay_where_they_are() -> None:
    for dtype in (F32, BF16, F16):
        output = draw(0, 9, 40, dtype=dtype)
        output[1, 3], output[2, 39] = torch.nan, torch.inf
        factors = draw(1, 3, 9, 40, dtype=dtype)
        factor_update(factors, output, 5.0, known=2)
        assert all(torch.equal(f.isfinite(), output.isfinite()) for f in factors)
        assert all(f[2, 39] == torch.inf for f in factors)
        x = draw(2, 9, 40, dtype=dtype)
        got = forecast_gate_add(x, factors, weights=[1.0, 2.0, 2.0])
        assert torch.equal(got.isfinite(), output.isfinite()) and got[1, 3].isnan() and got[2, 39] == torch.inf


def test_nothing_to_do_and_too_much() -> None:
    assert factor_update(torch.empty(2, 0, 8), torch.empty(0, 8), 1.0, known=1) == 2
    empty = torch.empty(1, 0, 8)
    assert forecast_gate_add(empty, empty[None], weights=[1.0]).shape == (1, 0, 8)
    with pytest.raises(EmulatorError, match="error code 1"):
        factor_update(torch.empty(6, 8), torch.empty(8), 1.0, known=5)
