"""gather_rows and scatter_rows by the emulated kernels, through the host entries of the CUDA operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load

INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
MAX_TENSORS = 4


class _Pair(ctypes.Structure):
    _fields_ = [
        ("full", POINTER),
        ("part", POINTER),
        *((name, LONG) for name in ("full_batch", "full_row", "part_batch", "part_row", "row_bytes")),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [("data", POINTER), ("dtype", INT), *((name, LONG) for name in ("batch", "slot", "channel"))]


class RowsParams(ctypes.Structure):
    """``vdit::RowsParams``."""

    _fields_ = [
        ("pair", _Pair * MAX_TENSORS),
        *((name, INT) for name in ("pairs", "batch", "tokens", "slots")),
        ("rows", POINTER),
        ("rows_batch", LONG),
        ("rows_slot", LONG),
        ("count", POINTER),
        ("count_batch", LONG),
        ("dtype", INT),
        ("add", INT),
        ("gate", _Gate),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load("rows")
    size = library.vdit_emu_rows_params_bytes()
    assert size == ctypes.sizeof(RowsParams), f"rows: Python has {ctypes.sizeof(RowsParams)} bytes, C++ {size}"
    return library


def _params(full: Sequence[Tensor], part: Sequence[Tensor], rows: Tensor, count: Tensor | None) -> RowsParams:
    p = RowsParams(pairs=len(full), batch=full[0].shape[0], tokens=full[0].shape[1], slots=rows.shape[1])
    for i, (x, y) in enumerate(zip(full, part, strict=True)):
        size = x.element_size()
        strides = [t.stride(d) * size for t in (x, y) for d in (0, 1)]
        p.pair[i] = _Pair(x.data_ptr(), y.data_ptr(), *strides, x[0, 0].numel() * size if x.numel() else 0)
    p.rows, p.rows_batch, p.rows_slot = rows.data_ptr(), 0 if rows.shape[0] == 1 else rows.stride(0), rows.stride(1)
    if count is not None:
        p.count, p.count_batch = count.data_ptr(), 0 if count.shape[0] == 1 else count.stride(0)
    return p


def _run(name: str, params: RowsParams, policy: Policy) -> None:
    run_policy = c_policy(policy)
    call(getattr(_library(), f"vdit_emu_{name}"), policy, ctypes.byref(params), ctypes.byref(run_policy))


def gather_rows(
    x: Sequence[Tensor], rows: Tensor, count: Tensor | None = None, policy: Policy = LAZY_FORWARD
) -> list[Tensor]:
    """``vdit_fast.ops.gather_rows`` by the emulated kernel."""
    part = [torch.empty(t.shape[0], rows.shape[1], *t.shape[2:], dtype=t.dtype) for t in x]
    _run("gather_rows", _params(x, part, rows, count), policy)
    return part


def scatter_rows(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    rows: Tensor,
    count: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    add: bool = False,
    policy: Policy = LAZY_FORWARD,
) -> None:
    """``vdit_fast.ops.scatter_rows`` by the emulated kernel, into contiguous x."""
    assert all(t.is_contiguous() for t in x)
    p = _params(x, y, rows, count)
    p.add, p.dtype = int(add), DTYPES.get(x[0].dtype, 0)
    if gate is not None:
        strides = [0 if gate.shape[d] == 1 else gate.stride(d) for d in range(3)]
        p.gate = _Gate(gate.data_ptr(), DTYPES[gate.dtype], *strides)
    _run("scatter_rows", p, policy)
