"""The feature cache's kernels, emulated, through the host entries of the operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from emulator_adaln import _Rows, _Table
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load
from vdit_fast import reference

FLAT_ROW = 1 << 14


class _Module(ctypes.Structure):
    _fields_ = [
        ("factors", ctypes.c_void_p), ("factor_stride", ctypes.c_int64), ("gate", _Table),
        ("scales", ctypes.c_void_p), ("scale_stride", ctypes.c_int64),
    ]  # fmt: skip


class FactorUpdateParams(ctypes.Structure):
    """``vdit::FactorUpdateParams``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "total")),
        *((name, ctypes.c_int32) for name in ("dim", "half", "factor_dtype")),
        *((name, _Rows) for name in ("output", "minus")),
        ("factors", ctypes.c_void_p),
        ("factor_stride", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scale_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("last", "stream")),
        ("distance", ctypes.c_float),
    ]


class ForecastParams(ctypes.Structure):
    """``vdit::ForecastParams``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "total")),
        *((name, ctypes.c_int32) for name in ("dim", "half", "factor_dtype", "row_dtype", "base_dtype", "out_dtype")),
        ("x", _Rows),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_batch_stride", "out_token_stride")),
        ("index", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("index_batch_stride", "index_stride")),
        ("module", _Module * 3),
        ("weight", ctypes.c_float * 5),
        *((name, ctypes.c_int32) for name in ("modules", "factors", "round", "stream")),
    ]


def _half(*tensors: Tensor | None) -> int:
    return next((DTYPES[t.dtype] for t in tensors if t is not None and t.element_size() == 2), 2)


def _walk(p: Any, tensors: Sequence[Tensor | None], as_is: bool, flat_row: int, scaled: bool) -> list[_Rows]:
    """Shape and strides of the rows, as the operator passes them; rows with a scale are those of the tensors."""
    held = [t for t in tensors if t is not None]
    p.total = held[0].numel()
    if scaled and not as_is:
        while held[0].dim() != 3:
            change = (lambda t: t[None]) if held[0].dim() < 3 else (lambda t: t.flatten(0, 1))
            tensors = [None if t is None else change(t) for t in tensors]
            held = [t for t in tensors if t is not None]
    flat = not as_is and not scaled and all(t.is_contiguous() for t in held)
    if flat:
        p.batch, p.tokens, p.dim = 1, -(-p.total // flat_row), min(p.total, flat_row)
    else:
        p.batch, p.tokens, p.dim = held[0].shape
    return [
        _Rows() if t is None else _Rows(t.data_ptr(), *((0, flat_row) if flat else t.stride()[:2]), DTYPES[t.dtype])
        for t in tensors
    ]


def factor_update(
    factors: Tensor,
    output: Tensor,
    distance: float,
    *,
    known: int,
    minus: Tensor | None = None,
    scales: Tensor | None = None,
    flat_row: int = FLAT_ROW,
    policy: Policy = LAZY_FORWARD,
) -> int:
    """``ops.factor_update`` on CPU tensors as on a GPU.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("cache")
    size = library.vdit_emu_factor_update_params_bytes()
    assert size == ctypes.sizeof(FactorUpdateParams), f"Python has {ctypes.sizeof(FactorUpdateParams)}, C++ {size}"
    p = FactorUpdateParams(half=_half(factors, output, minus), distance=distance)
    p.factor_dtype = DTYPES.get(factors.dtype, 0)
    p.output, p.minus = _walk(p, (output, minus), False, flat_row, scales is not None)
    p.factors, p.factor_stride = factors.data_ptr(), factors.stride(0)
    if scales is not None:
        p.scales, p.scale_stride = scales.data_ptr(), scales.stride(0)
    p.last = min(known, len(factors) - 1)
    run_policy = c_policy(policy)
    call(library.vdit_emu_factor_update, policy, ctypes.byref(p), ctypes.c_int(len(factors)), ctypes.byref(run_policy))
    return p.last + 1


def forecast_gate_add(
    x: Tensor | None,
    factors: Tensor | list[Tensor],
    gate: Any = None,
    *,
    weights: Sequence[float],
    index: Tensor | None = None,
    rounding: str = "fast",
    out: Tensor | None = None,
    scales: Any = None,
    flat_row: int = FLAT_ROW,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``ops.forecast_gate_add`` of tables ``[Bt, R, D]``; without x ``ops.forecast`` into ``out``."""
    library = load("cache")
    size = library.vdit_emu_forecast_params_bytes()
    assert size == ctypes.sizeof(ForecastParams), f"Python has {ctypes.sizeof(ForecastParams)}, C++ {size}"
    modules = [factors] if isinstance(factors, Tensor) else factors
    gates = [gate] * len(modules) if not isinstance(gate, list) else gate
    parts = [g if isinstance(g, tuple) else (None, g) for g in gates]
    eager = rounding == "eager"
    if out is None:
        assert x is not None
        out = torch.full(x.shape, torch.nan, dtype=x.dtype)
    every = [x, out, *modules, *(t for pair in parts for t in pair)]
    p = ForecastParams(half=_half(*every), out_dtype=DTYPES[out.dtype])
    p.factor_dtype = DTYPES.get(modules[0].dtype, 0)
    held = reference.cache.scales_of(modules, scales)
    to, p.x = _walk(p, (out, x), any(g is not None for g in gates), flat_row, held[0] is not None)
    p.out, p.out_batch_stride, p.out_token_stride = to.data, to.batch_stride, to.token_stride
    for j, (one, row_scales, (base, rows)) in enumerate(zip(modules, held, parts, strict=True)):
        m = p.module[j]
        m.factors, m.factor_stride = one.data_ptr(), one.stride(0)
        if row_scales is not None:
            m.scales, m.scale_stride = row_scales.data_ptr(), row_scales.stride(0)
        if rows is None:
            continue
        rounded = eager and all(t is None or t.element_size() == 2 for t in (base, rows))
        stride = 0 if rows.shape[0] == 1 else rows.stride(0)
        pointer = None if base is None else base.data_ptr()
        m.gate = _Table(rows.data_ptr(), pointer, stride, rows.stride(1), rows.shape[1], rounded)
        p.row_dtype = DTYPES[rows.dtype]
        p.base_dtype = p.base_dtype if base is None else DTYPES[base.dtype]
    if index is not None:
        p.index, p.index_stride = index.data_ptr(), index.stride(-1)
        p.index_batch_stride = index.stride(0) if index.dim() == 2 else 0
    p.weight[:] = [*weights, *[float("nan")] * (5 - len(weights))]
    p.modules, p.factors = len(modules), len(weights)
    p.round = eager and out.element_size() == 2
    extent = 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) if out.numel() else 0
    run_policy = c_policy(policy)
    call(
        library.vdit_emu_forecast_gate_add, policy, ctypes.byref(p), ctypes.c_int64(extent * out.element_size()),
        ctypes.byref(run_policy),
    )  # fmt: skip
    return out
