"""The adaptive norms by the emulated kernels, through the host entry of the operators."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load

NORMS = {"none": 0, "rms": 1, "layer": 2}


class _Rows(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch_stride", "token_stride")),
        ("dtype", ctypes.c_int32),
    ]


class _Table(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "base")),
        *((name, ctypes.c_int64) for name in ("batch_stride", "row_stride")),
        *((name, ctypes.c_int32) for name in ("rows", "round")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int32) for name in ("dtype", "round")),
    ]


class AdaLNParams(ctypes.Structure):
    """``vdit::AdaLNParams``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens")),
        *((name, ctypes.c_int32) for name in ("dim", "half", "row_dtype", "base_dtype")),
        *((name, _Rows) for name in "xy"),
        *((name, _Table) for name in ("gate", "scale", "shift")),
        ("index", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("index_batch_stride", "index_stride")),
        *((name, _Norm) for name in ("norm", "post")),
        *(
            (name, ctypes.c_int32)
            for name in ("tanh_gate", "round_post", "round_gated", "round_new", "round_chain")
        ),
        *((name, ctypes.c_void_p) for name in ("x_new", "h")),
    ]  # fmt: skip


def _half(*tensors: Tensor | None) -> bool:
    return all(t is None or t.element_size() == 2 for t in tensors)


def run(
    op: str,
    x: Tensor,
    y: Tensor | None = None,
    gate: Any = None,
    scale: Any = None,
    shift: Any = None,
    *,
    index: Tensor | None = None,
    gate_activation: str | None = None,
    post_norm: str = "none",
    post_eps: float = 1e-6,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rounding: str = "fast",
    processors: int = 1,
    policy: Policy = LAZY_FORWARD,
) -> tuple[Tensor, ...]:
    """``ops.<op>`` of tables ``[Bt, R, D]`` as on a GPU with that many multiprocessors; always a tuple.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("adaln")
    size = library.vdit_emu_adaln_params_bytes()
    assert size == ctypes.sizeof(AdaLNParams), f"Python has {ctypes.sizeof(AdaLNParams)} bytes, C++ {size}"
    eager = rounding == "eager"
    tables = {"gate": gate, "scale": scale, "shift": shift}
    parts = {n: t if isinstance(t, tuple) else (None, t) for n, t in tables.items() if t is not None}
    every = [x, y, weight, post_weight, *(t for pair in parts.values() for t in pair)]
    p = AdaLNParams(*x.shape, next((DTYPES[t.dtype] for t in every if t is not None and _half(t)), 2))

    def rows(t: Tensor) -> _Rows:
        return _Rows(t.data_ptr(), t.stride(0), t.stride(1), DTYPES[t.dtype])

    def describe(kind: str, epsilon: float, w: Tensor | None, b: Tensor | None) -> _Norm:
        first = w if w is not None else b
        pointers = [None if t is None else t.data_ptr() for t in (w, b)]
        return _Norm(NORMS[kind], epsilon, *pointers, 0 if first is None else DTYPES[first.dtype],
                     eager and kind == "rms" and w is not None and _half(w))  # fmt: skip

    p.x = rows(x)
    if y is not None:
        p.y = rows(y)
    for name, (base, t) in parts.items():
        rounded = eager and _half(t, base)
        stride = 0 if t.shape[0] == 1 else t.stride(0)
        pointer = None if base is None else base.data_ptr()
        setattr(p, name, _Table(t.data_ptr(), pointer, stride, t.stride(1), t.shape[1], rounded))
        p.row_dtype = DTYPES[t.dtype]
        p.base_dtype = p.base_dtype if base is None else DTYPES[base.dtype]
    if index is not None:
        p.index, p.index_stride = index.data_ptr(), index.stride(-1)
        p.index_batch_stride = index.stride(0) if index.dim() == 2 else 0
    p.norm, p.post = describe(norm, eps, weight, bias), describe(post_norm, post_eps, post_weight, post_bias)
    p.tanh_gate = gate_activation == "tanh"
    half_y = y is not None and _half(y)
    p.round_post = (eager and half_y and post_norm == "layer") or p.post.round
    p.round_gated = p.gate.round and half_y
    p.round_new = eager and _half(x)
    wide_rms = norm == "rms" and weight is not None and not _half(weight)
    p.round_chain = (p.scale if scale is not None else p.shift).round and _half(x) and not wide_rms
    x_new, h = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
    results = {"adaln_modulate": (h,), "gate_residual": (x_new,), "gate_residual_norm": (x_new, h)}[op]
    p.x_new = None if op == "adaln_modulate" else x_new.data_ptr()
    p.h = None if op == "gate_residual" else h.data_ptr()
    run_policy = c_policy(policy)
    call(library.vdit_emu_adaln, policy, ctypes.byref(p), ctypes.c_int(processors), ctypes.byref(run_policy))
    return results
