"""QK norm and RoPE by the emulated kernels: inside ``with Emulated(policy):`` the operator runs there."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load

INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = [("data", POINTER), *((f"{n}_stride", LONG) for n in ("batch", "row", "head"))]


class _Ints(ctypes.Structure):
    _fields_ = [("data", POINTER), *((n, LONG) for n in ("batch_stride", "head_stride", "stride")), ("bytes", INT)]


class _Table(ctypes.Structure):
    _fields_ = [
        *((n, POINTER) for n in ("cos", "sin")),
        *((f"{n}_stride", LONG) for n in ("batch", "row", "head")),
        ("positions", _Ints),
        *((n, INT) for n in ("rows", "start", "dtype", "half")),
    ]


class _Stream(ctypes.Structure):
    _fields_ = [
        ("x", _Rows),
        ("out", POINTER),
        *((f"out_{n}_stride", LONG) for n in ("batch", "row", "head")),
        ("rows", _Ints),
        *((n, POINTER) for n in ("weight", "bias")),
        ("rope", _Table),
        *((n, INT) for n in ("tokens", "heads", "out_tokens", "weight_dtype", "copy")),
    ]


class QkNormRopeParams(ctypes.Structure):
    """``vdit::QkNormRopeParams``."""

    _fields_ = [
        ("stream", _Stream * 3),
        *((n, INT) for n in ("streams", "batch", "dim", "rotary", "axes")),
        ("width", INT * 4),
        *((n, INT) for n in ("dtype", "norm", "rounding", "round_products", "relu")),
        ("eps", ctypes.c_float),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load("qk_norm_rope")
    size = library.vdit_emu_qk_norm_rope_params_bytes()
    assert size == ctypes.sizeof(QkNormRopeParams), f"Python has {ctypes.sizeof(QkNormRopeParams)} bytes, C++ {size}"
    return library


def _stride(t: Tensor, dim: int) -> int:
    return 0 if t.shape[dim] == 1 else t.stride(dim)


def _ints(t: Tensor | None) -> _Ints:
    return _Ints() if t is None else _Ints(t.data_ptr(), _stride(t, 0), _stride(t, 1), t.stride(2), 4)


def _stream(
    x: Tensor, out: Tensor, rows: Tensor | None, rotary: int, weight: Tensor | None = None, bias: Tensor | None = None,
    cos: Tensor | None = None, sin: Tensor | None = None, positions: Tensor | None = None, start: int = 0,
    copy: bool = False,
) -> _Stream:  # fmt: skip
    table = _Table()
    if cos is not None and sin is not None:
        strides = (_stride(cos, 0), cos.stride(1), _stride(cos, 2))
        half = int(cos.shape[3] != rotary)
        table = _Table(
            cos.data_ptr(), sin.data_ptr(), *strides, _ints(positions), cos.shape[1], start, DTYPES[cos.dtype], half
        )
    return _Stream(
        _Rows(x.data_ptr(), *x.stride()[:3]), out.data_ptr(), *out.stride()[:3], _ints(rows),
        None if weight is None else weight.data_ptr(), None if bias is None else bias.data_ptr(), table, x.shape[1],
        x.shape[2], out.shape[1], 0 if weight is None else DTYPES[weight.dtype], int(copy),
    )  # fmt: skip


def run(policy: Policy, *arguments: Any) -> None:
    """The arguments of ``torch.ops.vdit_fast.qk_norm_rope``, which the operator's own checks have passed."""
    q, k, v, q_weight, q_bias, k_weight, k_bias, q_cos, q_sin, k_cos, k_sin, q_positions, k_positions = arguments[:13]
    q_rows, kv_rows, norm, eps, rotary, axes, q_start, k_start, rounding, products, relu = arguments[13:24]
    q_out, k_out, v_out = arguments[24:]
    streams = [_stream(q, q_out, q_rows, rotary, q_weight, q_bias, q_cos, q_sin, q_positions, q_start)]
    if k is not None:
        streams.append(_stream(k, k_out, kv_rows, rotary, k_weight, k_bias, k_cos, k_sin, k_positions, k_start))
    if v is not None:
        streams.append(_stream(v, v_out, kv_rows, rotary, copy=True))
    params = QkNormRopeParams(
        (_Stream * 3)(*streams), len(streams), q.shape[0], q.shape[3], rotary, len(axes), (INT * 4)(*axes),
        DTYPES[q.dtype], norm, rounding, int(products), int(relu), eps,
    )  # fmt: skip
    run_policy = c_policy(policy)
    call(_library().vdit_emu_qk_norm_rope, policy, ctypes.byref(params), ctypes.byref(run_policy))


class Emulated(TorchDispatchMode):
    """Sends calls of the operator to the emulator; everything else runs as usual."""

    def __init__(self, policy: Policy = LAZY_FORWARD) -> None:
        super().__init__()
        self.policy = policy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vdit_fast.qk_norm_rope.default:
            return run(self.policy, *args)
        return func(*args, **(kwargs or {}))
