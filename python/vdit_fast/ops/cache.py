"""The feature cache's kernels: difference factors of a module's output, and the sum that forecasts from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.adaln import Rounding
from ..reference.cache import Gates, Scales, modules_and_gates, result_dtype, scales_of
from ._no_gradient import refuses_gradients
from .adaln import _eager, _table


def taylor_weights(steps_ahead: float, *, known: int, damping: float = 1.0) -> list[float]:
    """``(damping · steps_ahead)^i / i!`` for the ``known`` first factors: TaylorSeer's polynomial (arXiv 2503.06923).

    Args:
        steps_ahead: steps since the last computed output.
        known: factors that ``factor_update`` has filled, at least 1.
        damping: shortens the reach; 1 is the paper's formula, 0 repeats the last output.

    Raises:
        ValueError: known is less than 1, or a number is not finite.
    """
    if known < 1:
        raise ValueError(f"known is {known}; a forecast needs at least one computed output")
    reach = damping * steps_ahead
    if not math.isfinite(reach):
        raise ValueError(f"steps_ahead is {steps_ahead} and damping {damping}; expected finite numbers")
    return [reach**i / math.factorial(i) for i in range(known)]


def factor_update(
    factors: Tensor,
    output: Tensor,
    distance: float,
    *,
    known: int,
    minus: Tensor | None = None,
    scales: Tensor | None = None,
) -> int:
    """Take a computed output into its factors, in place and in one pass: ``F_0 ← output`` and
    ``F_{i+1} ← (F_i new − F_i old) / distance`` (TaylorSeer, arXiv 2503.06923).

    With ``minus`` the offset ``output − minus`` is what is cached, as by Δ-DiT (arXiv 2406.01125): the span's input is
    read beside its output. One order becomes valid per call: with ``known`` factors from earlier calls F_0 … F_known
    are written, as far as there are any, and nothing else is read or written. Arithmetic is fp32, with one rounding per
    factor that is stored.

    float8_e4m3fn factors keep a byte per number, and ``scales`` a power of two per row of the last dimension. Old
    factors are what code · scale stands for; new ones are rounded to the nearest code: by at most 2⁻⁴ of their
    magnitude, or 2⁻¹⁰ of the row's scale, which is less than 1/224 of the row's largest magnitude. Infinities are
    stored as NaN, and count as little as NaN for the scale of their row.

    Has no gradient: call it under ``torch.no_grad()``.

    Args:
        factors: ``[order + 1, *output.shape]``, one buffer for a module, order 0 to 4; float32, float16, bfloat16, or
            float8_e4m3fn with rows of at most 16384. Every factor is contiguous; the stride between factors is free.
            Changed in place.
        output: what was computed; float32, float16 or bfloat16, at most one 16-bit dtype among all three tensors. Any
            strides that three dimensions can express, the last of them contiguous; with scales that is the row. It may
            be a factor itself, but may not overlap them otherwise.
        distance: steps since the output before this one; finite, not 0. Ignored with ``known`` 0.
        known: factors that hold something, 0 (the first output) to order + 1.
        minus: None, or what is subtracted from the output, as ``output``.
        scales: of float8_e4m3fn factors, and of no others: float32 ``[order + 1, *output.shape[:-1]]``, those of a
            factor contiguous. Changed in place with the factors.

    Returns:
        The factors that are known now: ``min(known + 1, order + 1)``.

    Raises:
        RuntimeError: shapes, dtypes, strides, devices or numbers do not fit, or a gradient is asked for.
    """
    torch.ops.vdit_fast.factor_update(factors, output, minus, float(distance), known, scales)
    return min(known + 1, factors.shape[0])


def forecast(
    factors: Tensor,
    *,
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``Σ_i weights[i] · F_i``, in fp32 with one rounding: a forecast output alone, as of a whole transformer.

    Has no gradient: call it under ``torch.no_grad()``.

    Args:
        factors: as in ``factor_update``; only the first ``len(weights)`` factors are read.
        weights: 1 to ``order + 1`` finite numbers, as from ``taylor_weights``.
        dtype: of the result, float32 or the one 16-bit dtype; None is that of ``out``, or of the factors.
        out: where the result goes, of the shape of one factor; None makes a new tensor.
        scales: as in ``factor_update``.

    Returns:
        ``out``, or a new contiguous tensor of the shape of one factor.

    Raises:
        RuntimeError: shapes, dtypes, devices or weights do not fit, or a gradient is asked for.
        ValueError: dtype is not that of out, or float8, or neither is there and the factors are in float8_e4m3fn.
    """
    if out is None:
        out = factors.new_empty(factors.shape[1:], dtype=result_dtype(factors, dtype))
    elif dtype not in (None, out.dtype):
        raise ValueError(f"dtype is {dtype} but out is {out.dtype}; pass one of them")
    torch.ops.vdit_fast.forecast_gate_add(
        None, [factors], [None], [None], None, list(map(float, weights)), False, [scales], out
    )
    return out


def forecast_gate_add(
    x: Tensor,
    factors: Tensor | Sequence[Tensor],
    gate: Gates = None,
    *,
    weights: Sequence[float],
    index: Tensor | None = None,
    rounding: Rounding = "fast",
    out: Tensor | None = None,
    scales: Scales = None,
) -> Tensor:
    """``x + Σ_j gate_j · (Σ_i weights[i] · F_ij)``: a transformer block whose modules are forecast from their factors
    instead of computed (TaylorSeer, arXiv 2503.06923), in one pass that reads every operand once.

    With ``weights=[1.0]`` and no gate it adds a cached offset (Δ-DiT, arXiv 2406.01125).

    ``fast`` computes in fp32 and rounds once. ``eager`` rounds where the model would if its modules returned their
    forecasts in x's dtype: every forecast, its product with a 16-bit gate, and every sum. It equals ``forecast`` and
    ``gate_residual`` with ``eager`` rounding, one module after the other.

    Has no gradient: call it under ``torch.no_grad()``.

    Args:
        x: the residual; float32, float16 or bfloat16. With a gate ``[B, N, D]`` with a contiguous last dimension,
            otherwise of any shape and any strides that three dimensions can express, the last of them contiguous.
        factors: of one module, ``[order + 1, *x.shape]`` as in ``factor_update``, or a list of one to three modules;
            all have one dtype.
        gate: a table as in ``adaln_modulate`` (``[D]``, ``[B, D]``, ``[B, R, D]``, or a pair ``(base, table)``), or
            None for 1; for a list of modules a list of them.
        weights: 1 to ``order + 1`` finite numbers, as from ``taylor_weights``, the same for all modules.
        index: int32 ``[N]`` or ``[B, N]``: the row of every token in gates with more than one row, as in
            ``adaln_modulate``.
        rounding: ``"fast"`` or ``"eager"``.
        out: where the result goes: None makes a new tensor; x itself is updated in place, which spares the memory.
        scales: of factors in float8_e4m3fn, as in ``factor_update``; for a list of modules a list of them.

    Returns:
        ``out``, or a new contiguous tensor with x's shape and dtype.

    Raises:
        ValueError: rounding or a table has no such value or form, or the lists differ in length.
        RuntimeError: shapes, dtypes, devices, indices or weights do not fit, or a gradient is asked for.
    """
    modules, gates = modules_and_gates(factors, gate)
    tables = [_table("gate", g) for g in gates]
    if out is None:
        out = x.new_empty(x.shape)
    torch.ops.vdit_fast.forecast_gate_add(
        x, modules, [rows for _, rows in tables], [base for base, _ in tables], index, list(map(float, weights)),
        _eager(rounding), scales_of(modules, scales), out,
    )  # fmt: skip
    return out


@torch.library.register_fake("vdit_fast::factor_update")
def _fake_update(*_: Any) -> None:
    return None


@torch.library.register_fake("vdit_fast::forecast_gate_add")
def _fake_forecast(*_: Any) -> None:
    return None


refuses_gradients("factor_update", "vdit_fast.reference.factor_update")
refuses_gradients("forecast_gate_add", "vdit_fast.reference.forecast_gate_add")
