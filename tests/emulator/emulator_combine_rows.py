"""Rows added up by weight by the emulated kernel, through the host entry of the operator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load


class CombineRowsParams(ctypes.Structure):
    """``vdit::CombineRowsParams``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "sources", "rows_per_gate")),
        *((name, ctypes.c_int32) for name in ("dim", "slots_per_row", "dtype")),
        *((name, ctypes.c_void_p) for name in ("source", "slots", "weights", "base", "residual", "gate")),
        *((name, ctypes.c_int64) for name in ("source_stride", "base_stride", "residual_stride", "gate_stride")),
        ("out", ctypes.c_void_p),
    ]


def combine_rows(
    rows: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``ops.combine_rows`` as on a GPU.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("combine_rows")
    size = library.vdit_emu_combine_rows_params_bytes()
    assert size == ctypes.sizeof(CombineRowsParams), f"Python has {ctypes.sizeof(CombineRowsParams)} bytes, C++ {size}"
    out = torch.empty(slots.shape[0], rows.shape[1], dtype=rows.dtype)
    per_gate = 1 if gate is None else max(1, slots.shape[0] // gate.shape[0])
    given = (rows, slots, weights, base, residual, gate)
    p = CombineRowsParams(
        slots.shape[0], rows.shape[0], per_gate, rows.shape[1], slots.shape[1], DTYPES[rows.dtype],
        *(None if t is None else t.data_ptr() for t in given),
        *(0 if t is None else t.stride(0) for t in (rows, base, residual, gate)), out.data_ptr(),
    )  # fmt: skip
    run_policy = c_policy(policy)
    call(library.vdit_emu_combine_rows, policy, ctypes.byref(p), ctypes.byref(run_policy))
    return out
