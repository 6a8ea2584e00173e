"""Linear attention by the emulated kernels, through the host entries of the CUDA operators."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, c_policy, call, load
from vdit_fast.ops.linear_attention import FEATURE_MAPS

INT, LONG, ADDRESS = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = [("data", ADDRESS), *((f"{n}_stride", LONG) for n in ("batch", "row", "head"))]


class _Ints(ctypes.Structure):
    _fields_ = [("data", ADDRESS), *((n, LONG) for n in ("batch_stride", "head_stride", "stride")), ("bytes", INT)]


class _Weight(ctypes.Structure):
    _fields_ = [("data", ADDRESS), ("head_stride", LONG), ("row_stride", LONG), ("dtype", INT)]


class StateParams(ctypes.Structure):
    """``vdit::LinearStateParams``."""

    _fields_ = [
        *((n, _Rows) for n in ("k", "v", "k_den")),
        ("weight", _Weight),
        ("kv_len", _Ints),
        *((n, INT) for n in ("batch", "heads", "length", "dim", "dim_v", "dtype", "map")),
        ("state", ADDRESS),
    ]


class ReadoutParams(ctypes.Structure):
    """``vdit::LinearReadoutParams``."""

    _fields_ = [
        *((n, _Rows) for n in ("q", "q_den")),
        ("weight", _Weight),
        ("state", ADDRESS),
        *((n, INT) for n in ("batch", "heads", "kv_heads", "length", "dim", "dim_v", "dtype", "map")),
        ("eps", ctypes.c_float),
        ("out", ADDRESS),
    ]


@cache
def _library() -> ctypes.CDLL:
    library = load("linear_attention")
    for name, structure in (("state", StateParams), ("readout", ReadoutParams)):
        size = getattr(library, f"vdit_emu_linear_{name}_params_bytes")()
        assert size == ctypes.sizeof(structure), f"{name}: Python has {ctypes.sizeof(structure)} bytes, C++ {size}"
    return library


def _rows(t: Tensor | None) -> _Rows:
    return _Rows() if t is None else _Rows(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _weight(t: Tensor | None) -> _Weight:
    if t is None:
        return _Weight()
    return _Weight(t.data_ptr(), 0 if t.dim() == 2 else t.stride(0), t.stride(-2), DTYPES[t.dtype])


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    weight: Tensor | None = None,
    k_den: Tensor | None = None,
    kv_len: Tensor | None = None,
    splits: int = 0,
    processors: int = 4,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``vdit_fast.ops.linear_attention_state`` of CPU tensors; ``splits`` 0: as the operator chooses.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    batch, length, heads, dim = k.shape
    features = 2 * dim if feature_map == "hedgehog" else dim
    state = torch.empty(batch, heads, features, v.shape[3] + 1)
    lengths = _Ints(bytes=4) if kv_len is None else _Ints(kv_len.data_ptr(), kv_len.stride(0), 0, 0, kv_len.itemsize)
    sizes = (batch, heads, length, dim, v.shape[3], DTYPES[k.dtype], FEATURE_MAPS.index(feature_map))
    params = StateParams(_rows(k), _rows(v), _rows(k_den), _weight(weight), lengths, *sizes, state.data_ptr())
    run_policy = c_policy(policy)
    numbers = INT(splits), INT(processors)
    call(_library().vdit_emu_linear_state, policy, ctypes.byref(params), *numbers, ctypes.byref(run_policy))
    return state


def linear_attention_readout(
    q: Tensor,
    state: Tensor,
    *,
    feature_map: str = "hedgehog",
    weight: Tensor | None = None,
    q_den: Tensor | None = None,
    eps: float = 1e-15,
    processors: int = 4,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``vdit_fast.ops.linear_attention_readout`` of CPU tensors.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    batch, length, heads, dim = q.shape
    state = state.contiguous()
    out = torch.empty(batch, length, heads, state.shape[3] - 1, dtype=q.dtype)
    sizes = (batch, heads, state.shape[1], length, dim, state.shape[3] - 1, DTYPES[q.dtype])
    tail = (FEATURE_MAPS.index(feature_map), eps, out.data_ptr())
    params = ReadoutParams(_rows(q), _rows(q_den), _weight(weight), state.data_ptr(), *sizes, *tail)
    run_policy = c_policy(policy)
    pointers = ctypes.byref(params), INT(processors), ctypes.byref(run_policy)
    call(_library().vdit_emu_linear_readout, policy, *pointers)
    return out
