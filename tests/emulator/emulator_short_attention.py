"""Short attention by the emulated kernels, through the host entry of the operator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from emulator import LAZY_FORWARD, Policy, c_policy, call, load


class View(ctypes.Structure):
    """``vdit::ShortView``."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 5)]

    @classmethod
    def of(cls, x: Tensor) -> View:
        return cls(x.data_ptr(), (ctypes.c_int64 * 5)(*x.stride()))


class ShortAttentionParams(ctypes.Structure):
    """``vdit::ShortAttentionParams``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "places")),
        *((name, ctypes.c_int32) for name in ("heads", "lq", "lk", "dim", "dtype", "causal")),
        ("scale", ctypes.c_float),
        ("kv_len_bytes", ctypes.c_int32),
        *((name, View) for name in ("q", "k", "v", "out")),
        ("kv_len", ctypes.c_void_p),
        ("kv_len_stride", ctypes.c_int64),
    ]


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``ops.short_attention`` as on a GPU, of 5-D tensors.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("short_attention")
    size = library.vdit_emu_short_attention_params_bytes()
    assert size == ctypes.sizeof(ShortAttentionParams), f"Python has {ctypes.sizeof(ShortAttentionParams)}, C++ {size}"
    batch, lq, places, heads, dim = q.shape
    out = torch.empty_like(q)
    params = ShortAttentionParams(batch, places, heads, lq, k.shape[1], dim)
    params.dtype = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[q.dtype]
    params.causal, params.scale = causal, dim**-0.5 if scale is None else scale
    params.q, params.k, params.v, params.out = (View.of(x) for x in (q, k, v, out))
    if kv_len is not None:
        params.kv_len, params.kv_len_stride = kv_len.data_ptr(), kv_len.stride(0)
        params.kv_len_bytes = kv_len.element_size()
    run_policy = c_policy(policy)
    call(library.vdit_emu_short_attention, policy, ctypes.byref(params), ctypes.byref(run_policy))
    return out
