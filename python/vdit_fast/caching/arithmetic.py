"""The cache's arithmetic: this package's operators, and their readable twins where no kernel fits."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import ops
from .._info import kernel_catalogue
from ..reference import cache as reference
from ..reference.adaln import Rounding, Table

__all__ = ["factor_update", "forecast", "forecast_gate_add"]

_HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def _has_kernels(device_type: str) -> bool:
    names = {kernel["op"] for kernel in kernel_catalogue() if kernel["device"] == device_type and kernel["compiled"]}
    return {"factor_update", "forecast_gate_add"} <= names


def _fits(*tensors: Tensor | None) -> bool:
    """Whether the operators take these: one device with kernels, fp32 and one 16-bit dtype, rows of plain memory."""
    found = [t for t in tensors if t is not None]
    halves = {t.dtype for t in found} - {torch.float32}
    return (
        len(halves) <= 1
        and halves <= {*_HALVES}
        and len({t.device for t in found}) == 1
        and _has_kernels(found[0].device.type)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in found))
        and all(t.is_contiguous() or (t.ndim <= 3 and t.stride(-1) == 1) for t in found)
    )


def _parts(gates: Iterable[Table | None]) -> list[Tensor]:
    return [part for gate in gates if gate is not None for part in (gate if isinstance(gate, tuple) else (gate,))]


def factor_update(factors: Tensor, output: Tensor, distance: float, *, known: int, minus: Tensor | None = None) -> int:
    """See ``ops.factor_update``; any device, dtypes and strides."""
    how = ops if _fits(factors, output, minus) else reference
    return how.factor_update(factors, output, distance, known=known, minus=minus)


def forecast(factors: Tensor, *, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """See ``ops.forecast``; any device and dtypes."""
    fits = _fits(factors) and (dtype in (torch.float32, factors.dtype) or factors.dtype == torch.float32)
    how = ops if fits and dtype in (torch.float32, *_HALVES) else reference
    return how.forecast(factors, weights=weights, dtype=dtype)


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
    how = ops if _fits(x, *factors) and _fits(x, *_parts(gates)) else reference
    return how.forecast_gate_add(x, factors, gates, weights=weights, index=index, rounding=rounding)
