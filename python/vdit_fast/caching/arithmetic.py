"""The cache's arithmetic: this package's operators, and their readable twins where no kernel fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops, reference
from .._info import kernel_catalogue
from ..reference.adaln import Rounding, Table
from ..reference.cache import E4M3

__all__ = ["factor_update", "forecast", "forecast_gate_add"]

_DEVICES = {
    kernel["device"] for kernel in kernel_catalogue() if kernel["op"] == "forecast_gate_add" and kernel["compiled"]
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _served(factors: Sequence[Tensor], *tensors: Tensor | None) -> bool:
    """Whether the operators take tensors of this device, these dtypes and strides."""
    others = [tensor for tensor in tensors if tensor is not None]
    found = [*factors, *others]
    halves = {tensor.dtype for tensor in found if tensor.dtype.itemsize == 2}
    known = all(tensor.numel() > 0 for tensor in found)
    known &= all(tensor.dtype in _DTYPES for tensor in others)
    known &= all(tensor.dtype in (*_DTYPES, E4M3) for tensor in factors)
    return known and len(halves) <= 1 and found[0].device.type in _DEVICES


def _rows(x: Tensor) -> Tensor:
    """x as the operators take it: strides that three dimensions can express, the last of them contiguous."""
    return x if x.is_contiguous() or (x.ndim <= 3 and x.stride(-1) == 1) else x.contiguous()


def factor_update(
    factors: Tensor,
    output: Tensor,
    distance: float,
    *,
    known: int,
    minus: Tensor | None = None,
    scales: Tensor | None = None,
) -> int:
    """See ``ops.factor_update``; any device, dtypes and strides."""
    if not _served([factors], output, minus):
        return reference.factor_update(factors, output, distance, known=known, minus=minus, scales=scales)
    return ops.factor_update(
        factors, _rows(output), distance, known=known, minus=None if minus is None else _rows(minus), scales=scales
    )


def forecast(factors: Tensor, *, weights: Sequence[float], dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    """See ``ops.forecast``; any device and dtypes."""
    if dtype in _DTYPES and _served([factors], factors.new_empty(1, dtype=dtype)):
        return ops.forecast(factors, weights=weights, dtype=dtype, scales=scales)
    return reference.forecast(factors, weights=weights, dtype=dtype, scales=scales)


def forecast_gate_add(
    x: Tensor,
    factors: list[Tensor],
    gates: list[Table | None],
    *,
    weights: Sequence[float],
    index: Tensor | None = None,
    rounding: Rounding = "fast",
    scales: list[Tensor | None] | None = None,
) -> Tensor:
    """See ``ops.forecast_gate_add``; any device, dtypes and strides."""
    tables = [part for gate in gates for part in (gate if isinstance(gate, tuple) else (gate,))]
    if not _served(factors, x, *tables):
        return reference.forecast_gate_add(
            x, factors, gates, weights=weights, index=index, rounding=rounding, scales=scales
        )
    return ops.forecast_gate_add(
        _rows(x), factors, gates, weights=weights, index=index, rounding=rounding, scales=scales
    )
