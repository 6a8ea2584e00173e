"""The feature cache's kernels on a CUDA device: the emulated kernels' mixtures, and what only a device can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adaln_cases import BF16, F16, F32, draw, within
from cache_cases import (
    FORECASTS,
    UPDATES,
    coded_forecast,
    coded_update,
    double,
    forecast_arguments,
    same_codes,
    update_arguments,
)  # fmt: skip
from torch import Tensor

from vdit_fast import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same cases"),
]


def on_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    def one(v: Any) -> Any:
        if isinstance(v, (list, tuple)):
            return type(v)(map(one, v))
        return v.cuda() if isinstance(v, Tensor) else v

    return {k: one(v) for k, v in kwargs.items()}


@pytest.mark.parametrize("shape", [(2, 3, 40), (7, 13), (3,), (2, 300, 1536), (1, 1, 16385)], ids=str)
def test_updates(shape: tuple[int, ...]) -> None:
    for variant in UPDATES:
        kwargs = update_arguments(variant, shape)
        exact, given = double(kwargs), on_device(kwargs)
        known = ops.factor_update(**given)
        assert reference.factor_update(**kwargs) == reference.factor_update(**exact) == known
        for i in range(known):
            within(given["factors"][i].cpu(), kwargs["factors"][i], exact["factors"][i])


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dim", [1, 8, 13, 264, 1152, 5120, 5121])
def test_forecasts(dim: int, rounding: str) -> None:
    for variant in FORECASTS:
        kwargs = forecast_arguments(variant, (2, 50, dim), rounding, (BF16, F16, F32)[variant % 3])
        want, exact = (reference.forecast_gate_add(**args) for args in (kwargs, double(kwargs)))
        got = ops.forecast_gate_add(**on_device(kwargs))
        within(got.cpu(), want, exact)
        given = on_device(kwargs)
        ops.forecast_gate_add(**given, out=given["x"])
        assert torch.equal(given["x"], got)


@pytest.mark.parametrize(
    "shape", [(2, 3, 40), (7, 13), (3,), (2, 300, 1536), (3, 4104), (2, 5120), (2, 16384)], ids=str
)
def test_updates_in_e4m3_to_the_bit(shape: tuple[int, ...]) -> None:
    for variant in UPDATES:
        kwargs = coded_update(variant, shape)
        given = on_device(kwargs)
        assert ops.factor_update(**given) == reference.factor_update(**kwargs)
        assert same_codes(given["factors"].cpu(), kwargs["factors"])
        torch.testing.assert_close(given["scales"].cpu(), kwargs["scales"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rounding", ["fast", "eager"])
@pytest.mark.parametrize("dim", [1, 8, 13, 264, 1152, 5120, 5121])
def test_forecasts_in_e4m3(dim: int, rounding: str) -> None:
    for variant in FORECASTS:
        kwargs, exact = coded_forecast(variant, (2, 50, dim), rounding, (BF16, F16, F32)[variant % 3])
        got = ops.forecast_gate_add(**on_device(kwargs))
        within(got.cpu(), reference.forecast_gate_add(**kwargs), reference.forecast_gate_add(**exact))


def test_edges_in_e4m3() -> None:
    most = torch.finfo(F32).max
    x = torch.zeros(6, 320)
    x[0, :6] = torch.tensor([most, -most, 1.0, 3.3e38, torch.inf, torch.nan])
    x[1, :2] = torch.tensor([1e-45, torch.finfo(F32).tiny])
    x[2, 300], x[2, 7], x[3, 300], x[3, 7] = torch.inf, 2.0, torch.nan, 2.0
    x[4, 319], x[5, 0] = 448.0, 448.0001
    codes, scales = torch.zeros(1, 6, 320, device="cuda").to(torch.float8_e4m3fn), torch.zeros(1, 6, device="cuda")
    ops.factor_update(codes, x.cuda(), 1.0, known=0, scales=scales)
    want, want_scales = reference.cache.quantised(x)
    assert same_codes(codes[0].cpu(), want) and torch.equal(scales[0].cpu(), want_scales)


def test_many_rows_repeat_exactly_and_do_not_synchronise() -> None:
    kwargs = on_device(forecast_arguments(4, (2, 9000, 1536)))
    factors = [draw(0, 3, 2, 9000, 1536, dtype=BF16).cuda()] * 2
    factors[1] = factors[0].clone()
    first = ops.forecast_gate_add(**kwargs)
    ops.factor_update(factors[0], first.bfloat16(), 5, known=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = ops.forecast_gate_add(**kwargs)
        ops.factor_update(factors[1], second.bfloat16(), 5, known=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second) and torch.equal(*factors)


def test_graph_capture_replays_with_new_contents() -> None:
    kwargs = on_device(forecast_arguments(5, (2, 50, 264), dtype=BF16))
    factors = draw(0, 3, 2, 50, 264, dtype=BF16).cuda()
    ops.factor_update(factors, ops.forecast_gate_add(**kwargs), 5, known=2)  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.forecast_gate_add(**kwargs)
        ops.factor_update(factors, found, 5, known=2)
    kwargs["x"].copy_(draw(9, *kwargs["x"].shape, dtype=BF16))
    before = factors.clone()
    graph.replay()
    assert torch.equal(found, ops.forecast_gate_add(**kwargs))
    ops.factor_update(before, found, 5, known=2)
    assert torch.equal(factors, before)


def test_an_index_outside_the_table_reads_its_last_row() -> None:
    kwargs = on_device(forecast_arguments(7, (2, 4, 264)))
    for row in (-1, 3, 2**31 - 1):
        index = torch.full((4,), row, dtype=torch.int32, device="cuda")
        got, want = (ops.forecast_gate_add(**kwargs | {"index": i}) for i in (index, torch.full_like(index, 2)))
        assert torch.equal(got, want)


def test_mixed_devices_are_named() -> None:
    kwargs = on_device(forecast_arguments(7, (2, 4, 264)))
    with pytest.raises(RuntimeError, match="forecast_gate_add: index is on cpu but x is on cuda"):
        ops.forecast_gate_add(**kwargs | {"index": kwargs["index"].cpu()})
    with pytest.raises(RuntimeError, match="factor_update: factors is on cuda:0 but output is on cpu"):
        ops.factor_update(draw(0, 2, 8).cuda(), draw(0, 8), 1, known=0)
