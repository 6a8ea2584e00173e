"""The feature cache's kernels: difference factors of a module's output, and the sum that forecasts from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adaln import Rounding, Table, table_rows

Gates = Table | Sequence[Table | None] | None


def factor_update(factors: Tensor, output: Tensor, distance: float, *, known: int, minus: Tensor | None = None) -> int:
    """See ``ops.factor_update``; every tensor may also be fp64, and the arithmetic is fp64 where one is."""
    wide = _wide(factors, output, minus)
    new = output.to(wide, copy=True)
    if minus is not None:
        new -= minus
    last = min(known, len(factors) - 1)
    for i in range(last):
        old = factors[i].to(wide, copy=True)
        factors[i] = new
        new = (new - old) / distance
    factors[last] = new
    return last + 1


def forecast(factors: Tensor, *, weights: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """See ``ops.forecast``."""
    return _sum(factors, weights, _wide(factors)).to(dtype or factors.dtype)


def forecast_gate_add(
    x: Tensor,
    factors: Tensor | Sequence[Tensor],
    gate: Gates = None,
    *,
    weights: Sequence[float],
    index: Tensor | None = None,
    rounding: Rounding = "fast",
) -> Tensor:
    """See ``ops.forecast_gate_add``."""
    modules, gates = modules_and_gates(factors, gate)
    tables = [t for g in gates for t in (g if isinstance(g, tuple) else (g,))]
    wide, eager = _wide(x, *modules, *tables), rounding == "eager"
    total = x.to(wide)
    for one, table in zip(modules, gates, strict=True):
        branch = _rounded(_sum(one, weights, wide), eager, x.dtype)
        if table is not None:
            half = all(t.element_size() == 2 for t in (table if isinstance(table, tuple) else (table,)))
            rows = table_rows(table, x.shape[1], index, rounding, wide)
            branch = _rounded(rows * branch, eager and half, x.dtype)
        total = _rounded(total + branch, eager, x.dtype)
    return total.to(x.dtype)


def modules_and_gates(factors: Tensor | Sequence[Tensor], gate: Gates) -> tuple[list[Tensor], list[Table | None]]:
    """Factors and gates as lists of one length.

    Raises:
        ValueError: there are no modules, or not as many gates.
    """
    if isinstance(factors, Tensor):
        return [factors], [gate]  # type: ignore[list-item]
    modules = list(factors)
    gates = [None] * len(modules) if gate is None else list(gate) if isinstance(gate, list) else None
    if gates is None or not modules or len(gates) != len(modules):
        found = f"a list of {len(gates)}" if gates is not None else type(gate).__name__
        raise ValueError(
            f"factors is a list of {len(modules)} and gate is {found}; expected lists of one length, with None for "
            "every module without a gate"
        )
    return modules, gates


def _sum(factors: Tensor, weights: Sequence[float], wide: torch.dtype) -> Tensor:
    total = factors[0].to(wide) * weights[0]
    for factor, weight in zip(factors[1 : len(weights)], weights[1:], strict=True):
        total = total + factor.to(wide) * weight
    return total


def _rounded(x: Tensor, on: bool, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype) if on and dtype.itemsize == 2 else x


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
