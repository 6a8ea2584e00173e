"""The feature cache's kernels: difference factors of a module's output, and the sum that forecasts from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adaln import Rounding, Table, table_rows

Gates = Table | Sequence[Table | None] | None
Scales = Tensor | Sequence[Tensor | None] | None


E4M3 = torch.float8_e4m3fn
MAX_SCALED_ROW = 16384
"""Most elements that share a scale."""


def factor_update(
    factors: Tensor,
    output: Tensor,
    distance: float,
    *,
    known: int,
    minus: Tensor | None = None,
    scales: Tensor | None = None,
) -> int:
    """See ``ops.factor_update``; every tensor but the scales may also be fp64, and the arithmetic is fp64 where one
    is.

    Raises:
        ValueError: factors and scales do not fit each other, or output or minus is in float8.
    """
    _check_factors(factors, scales)
    _check_wide(output=output, minus=minus)
    wide = _wide(factors, output, minus)
    new = output.to(wide, copy=True)
    if minus is not None:
        new -= minus
    last = min(known, len(factors) - 1)
    if new.numel() == 0:  # scales of rows without numbers stay what they are
        return last + 1
    for i in range(last):
        old = _value(factors, scales, i, wide).clone()
        _keep(factors, scales, i, new)
        new = (new - old) / distance
    _keep(factors, scales, last, new)
    return last + 1


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as e4m3 codes and the fp32 scales of its rows: the smallest powers of two, at least 2⁻¹²⁶, with which every
    finite number is at most 448 scales. Infinities become NaN.

    Args:
        x: ``[*, D]``, fp32 or fp64.

    Returns:
        Codes ``[*, D]`` in float8_e4m3fn, and scales ``[*]``.
    """
    x = x.where(x.isfinite(), torch.nan)
    magnitudes = pad(x.nan_to_num(0.0).abs(), (0, 1))  # a zero more: rows may have no numbers
    mantissa, exponent = magnitudes.amax(-1).frexp()  # in [0.5, 1); 448 is 0.875 · 2⁹
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp_min(-126).where(mantissa > 0, -126)
    scales = torch.ones_like(exponent, dtype=torch.float32).ldexp(exponent)
    within = x.clamp(-240 * 2.0**120, 240 * 2.0**120).where((exponent == 120)[..., None], x)  # 256 · 2¹²⁰ is infinity
    return (within / scales[..., None]).float().to(E4M3), scales


def forecast(
    factors: Tensor, *, weights: Sequence[float], dtype: torch.dtype | None = None, scales: Tensor | None = None
) -> Tensor:
    """See ``ops.forecast``.

    Raises:
        ValueError: factors and scales do not fit each other, or the result would be in float8.
    """
    result = result_dtype(factors, dtype)
    _check_factors(factors, scales)
    return _sum(factors, scales, weights, _wide(factors)).to(result)


def forecast_gate_add(
    x: Tensor,
    factors: Tensor | Sequence[Tensor],
    gate: Gates = None,
    *,
    weights: Sequence[float],
    index: Tensor | None = None,
    rounding: Rounding = "fast",
    scales: Scales = None,
) -> Tensor:
    """See ``ops.forecast_gate_add``.

    Raises:
        ValueError: as there, or factors and scales do not fit each other, or x is in float8.
    """
    modules, gates = modules_and_gates(factors, gate)
    held = scales_of(modules, scales)
    for j, (one, row_scales) in enumerate(zip(modules, held, strict=True)):
        _check_factors(one, row_scales, f"[{j}]" if len(modules) > 1 else "", modules[0])
    _check_wide(x=x)
    tables = [t for g in gates for t in (g if isinstance(g, tuple) else (g,))]
    wide, eager = _wide(x, *modules, *tables), rounding == "eager"
    total = x.to(wide)
    for one, row_scales, table in zip(modules, held, gates, strict=True):
        branch = _rounded(_sum(one, row_scales, weights, wide), eager, x.dtype)
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


def scales_of(modules: Sequence[Tensor], scales: Scales) -> list[Tensor | None]:
    """Scales as a list, one or None for every module.

    Raises:
        ValueError: there are not as many as modules.
    """
    if scales is None:
        return [None] * len(modules)
    found: list[Tensor | None] = [scales] if isinstance(scales, Tensor) else list(scales)
    if len(found) != len(modules):
        raise ValueError(f"{len(modules)} modules but {len(found)} scales; pass one for every module, or None")
    return found


def result_dtype(factors: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a forecast.

    Raises:
        ValueError: None is asked for and the factors are in float8, or float8 is.
    """
    if dtype is None and factors.dtype.itemsize == 1:
        raise ValueError(f"factors are {factors.dtype}, which no result has; pass dtype or out")
    if dtype is not None and dtype.itemsize == 1:
        raise ValueError(f"dtype is {dtype}; expected that of a result, float32, float16 or bfloat16")
    return dtype or factors.dtype


def _check_factors(factors: Tensor, scales: Tensor | None, number: str = "", first: Tensor | None = None) -> None:
    """The operators' checks of a module's factors beside their scales, with their words."""
    name, of_scales = f"factors{number}", f"scales{number}"
    if first is not None and factors.dtype != first.dtype:
        raise ValueError(
            f"{name} is {_text(factors.dtype)} but the first module's factors are not; keep all modules in one dtype"
        )
    if factors.dtype != E4M3:
        if scales is not None:
            raise ValueError(
                f"{of_scales} beside factors in {_text(factors.dtype)}; only those in float8_e4m3fn have scales: "
                "pass None"
            )
        _check_wide(**{name: factors})
        return
    if scales is None:
        raise ValueError(
            f"{name} is float8_e4m3fn without {of_scales}; pass a float32 tensor of the shape of factors without the "
            "last dimension"
        )
    if factors.dim() < 2 or scales.shape != factors.shape[:-1]:
        raise ValueError(
            f"{of_scales} has shape {list(scales.shape)}; expected that of {name}, {list(factors.shape)}, without the "
            "last dimension"
        )
    if scales.dtype != torch.float32:
        raise ValueError(f"{of_scales} is {_text(scales.dtype)}; expected float32")
    if factors.shape[-1] > MAX_SCALED_ROW:
        raise ValueError(
            f"{name} has rows of {factors.shape[-1]} elements; at most {MAX_SCALED_ROW} share a scale: keep longer "
            "ones in another dtype"
        )


def _check_wide(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype.itemsize == 1:
            raise ValueError(f"{name} is {_text(t.dtype)}; convert it")


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _value(factors: Tensor, scales: Tensor | None, i: int, wide: torch.dtype) -> Tensor:
    """What factor i stands for."""
    value = factors[i].to(wide)
    return value if scales is None else value * scales[i][..., None]


def _keep(factors: Tensor, scales: Tensor | None, i: int, value: Tensor) -> None:
    if scales is None:
        factors[i] = value
    else:
        factors[i], scales[i] = quantised(value)


def _sum(factors: Tensor, scales: Tensor | None, weights: Sequence[float], wide: torch.dtype) -> Tensor:
    total = _value(factors, scales, 0, wide) * weights[0]
    for i, weight in enumerate(weights[1:], 1):
        total = total + _value(factors, scales, i, wide) * weight
    return total


def _rounded(x: Tensor, on: bool, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype) if on and dtype.itemsize == 2 else x


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
