"""The cache's arithmetic: this package's operators, and their readable twins where no kernel fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import cache as reference
from ..reference.adaln import Rounding, Table

__all__ = ["factor_update", "forecast", "forecast_gate_add"]


def factor_update(factors: Tensor, output: Tensor, distance: float, *, known: int, minus: Tensor | None = None) -> int:
    """See ``ops.factor_update``; any device, dtypes and strides."""
    return reference.factor_update(factors, output, distance, known=known, minus=minus)


def forecast(factors: Tensor, *, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """See ``ops.forecast``; any device and dtypes."""
    return reference.forecast(factors, weights=weights, dtype=dtype)


def forecast_gate_add(
    x: Tensor,
    factors: list[Tensor],
    gates: list[Table | None],
    *,
    weights: Sequence[float],
    index: Tensor | None = None,
    rounding: Rounding = "fast",
) -> Tensor:
    """See ``ops.forecast_gate_add``; any device, dtypes and strides."""
    return reference.forecast_gate_add(x, factors, gates, weights=weights, index=index, rounding=rounding)
