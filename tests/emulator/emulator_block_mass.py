"""score_lse, block_mass and softmax_mass by the emulated kernels, through the CUDA operators' host entries."""

from __future__ import annotations

import ctypes
from math import ceil

import torch
from torch import Tensor

from emulator import DTYPES, LAZY_FORWARD, Policy, _Rows, c_policy, call, load
from emulator import _rows as rows


class _Lengths(ctypes.Structure):
    """``vdit::gpu::Lengths``."""

    _fields_ = [("of", ctypes.c_void_p), ("bytes", ctypes.c_int32)]


def _lengths(t: Tensor | None) -> _Lengths:
    return _Lengths(None, 0) if t is None else _Lengths(t.data_ptr(), t.element_size())


class ScoreParams(ctypes.Structure):
    """``vdit::gpu::ScoreParams``."""

    _fields_ = [
        *((name, _Rows) for name in "qk"),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "dim", "lq", "lk", "fold", "dtype")),
        ("scale", ctypes.c_float),
        ("q_len", _Lengths),
        ("kv_len", _Lengths),
    ]


def _library() -> ctypes.CDLL:
    library = load("block_mass")
    size = library.vdit_emu_score_params_bytes()
    assert size == ctypes.sizeof(ScoreParams), f"Python has {ctypes.sizeof(ScoreParams)} bytes, C++ {size}"
    return library


def _params(
    q: Tensor, k: Tensor, scale: float | None, fold: int, kv_len: Tensor | None, q_len: Tensor | None = None
) -> ScoreParams:
    """The C structure; the tensors must outlive it."""
    batch, lq, heads, dim = q.shape
    return ScoreParams(
        rows(q),
        rows(k),
        *(batch, heads, k.shape[2], dim, lq, k.shape[1], fold, DTYPES[q.dtype]),
        dim**-0.5 / max(fold, 1) if scale is None else scale,
        _lengths(q_len),
        _lengths(kv_len),
    )


def _new_mass(q: Tensor, k: Tensor, q_block: int, kv_block: int, fold: int) -> Tensor:
    rows, columns = (ceil(x.shape[1] / max(fold, 1)) for x in (q, k))
    return torch.empty(q.shape[0], q.shape[2], ceil(rows / max(q_block, 1)), ceil(columns / max(kv_block, 1)))


def score_lse(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    fold: int = 1,
    kv_len: Tensor | None = None,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``vdit_fast.ops.score_lse`` of CPU tensors (bf16 or fp16).

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    lse = torch.empty(q.shape[0], q.shape[2], ceil(q.shape[1] / max(fold, 1)))
    params, run_policy = _params(q, k, scale, fold, kv_len), c_policy(policy)
    pointers = ctypes.byref(params), ctypes.c_void_p(lse.data_ptr()), ctypes.byref(run_policy)
    call(_library().vdit_emu_score_lse, policy, *pointers)
    return lse


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    *,
    scale: float | None = None,
    fold: int = 1,
    kv_len: Tensor | None = None,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``vdit_fast.ops.block_mass`` of CPU tensors (bf16 or fp16).

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    mass = _new_mass(q, k, q_block, kv_block, fold)
    lse = lse.contiguous()
    params, run_policy = _params(q, k, scale, fold, kv_len), c_policy(policy)
    call(
        _library().vdit_emu_block_mass,
        policy,
        ctypes.byref(params),
        ctypes.c_void_p(lse.data_ptr()),
        ctypes.c_int64(q_block),
        ctypes.c_int64(kv_block),
        ctypes.c_void_p(mass.data_ptr()),
        ctypes.c_size_t(mass.numel()),
        ctypes.byref(run_policy),
    )
    return mass


def softmax_mass(
    q: Tensor,
    k: Tensor,
    q_block: int,
    kv_block: int,
    *,
    scale: float | None = None,
    fold: int = 1,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    policy: Policy = LAZY_FORWARD,
) -> Tensor:
    """``vdit_fast.ops.softmax_mass`` of CPU tensors (bf16 or fp16).

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    mass = _new_mass(q, k, q_block, kv_block, fold)
    params, run_policy = _params(q, k, scale, fold, kv_len, q_len), c_policy(policy)
    call(
        _library().vdit_emu_softmax_mass,
        policy,
        ctypes.byref(params),
        ctypes.c_int64(q_block),
        ctypes.c_int64(kv_block),
        ctypes.c_void_p(mass.data_ptr()),
        ctypes.c_size_t(mass.numel()),
        ctypes.byref(run_policy),
    )
    return mass
