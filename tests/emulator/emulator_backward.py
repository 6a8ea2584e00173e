"""Gradients of attention by the emulated kernels, through the host entry that the CUDA operator calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emulator import (
    LAZY_FORWARD,
    MAX_SEGMENTS,
    AttentionParams,
    Policy,
    _Rows,
    attention_params,
    c_policy,
    call,
    load,
)
from emulator import _rows as rows
from vdit_fast import AttentionPlan


class BackwardParams(ctypes.Structure):
    """``vdit::gpu::BackwardParams``."""

    _fields_ = [
        ("forward", AttentionParams),
        ("dout", _Rows),
        ("out", _Rows),
        ("lse", ctypes.c_void_p),
        ("dlse", ctypes.c_void_p),
    ]


class BackwardOutputs(ctypes.Structure):
    """``vdit::gpu::BackwardOutputs``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
        ("segment_dk", ctypes.c_void_p * MAX_SEGMENTS),
        ("segment_dv", ctypes.c_void_p * MAX_SEGMENTS),
        ("segment_batch", ctypes.c_int32 * MAX_SEGMENTS),
    ]


@dataclass
class Gradients:
    """Gradients of one call, in the dtype of q."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    segments: list[tuple[Tensor, Tensor]]

    def named(self) -> dict[str, Tensor]:
        """All of them by name."""
        flat = {f"segment {i} d{n}": t for i, pair in enumerate(self.segments) for n, t in zip("kv", pair, strict=True)}
        return {"dq": self.dq, "dk": self.dk, "dv": self.dv, **flat}


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    kv_len: Tensor | None = None,
    segments: Sequence[tuple[Tensor, Tensor]] = (),
    policy: Policy = LAZY_FORWARD,
) -> Gradients:
    """Gradients of ``vdit_fast.attention`` for CPU tensors (bf16 or fp16); arguments of the operator.

    Raises:
        EmulatorError: with policy, seed, block and thread.
    """
    library = load("attention_backward")
    for name, structure in (("params", BackwardParams), ("outputs", BackwardOutputs)):
        size = getattr(library, f"vdit_emu_backward_{name}_bytes")()
        assert size == ctypes.sizeof(structure), f"{name}: Python has {ctypes.sizeof(structure)} bytes, C++ {size}"
    params = BackwardParams(attention_params(q, k, v, plan, scale, row_scale, kv_len, segments))
    params.dout, params.out = rows(dout), rows(out)
    params.lse = lse.data_ptr()
    params.dlse = None if dlse is None else dlse.data_ptr()

    def like(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=q.dtype)

    grads = Gradients(like(q), like(k), like(v), [(like(a), like(b)) for a, b in segments])
    outputs = BackwardOutputs(grads.dq.data_ptr(), grads.dk.data_ptr(), grads.dv.data_ptr())
    for i, (dk, dv) in enumerate(grads.segments):
        outputs.segment_dk[i], outputs.segment_dv[i] = dk.data_ptr(), dv.data_ptr()
        outputs.segment_batch[i] = dk.shape[0]
    run_policy = c_policy(policy)
    call(library.vdit_emu_attention_backward, policy, *(ctypes.byref(x) for x in (params, outputs, run_policy)))
    return grads
