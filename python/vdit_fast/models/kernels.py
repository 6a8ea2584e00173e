"""Which attention calls this installation has a kernel for, and the stand-in for those it has not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as functional
from torch import Tensor

from vdit_fast._info import kernel_catalogue
from vdit_fast.ops.attention import attention

if TYPE_CHECKING:
    from vdit_fast.plan import AttentionPlan

__all__ = [
    "FUSED_DEVICES",
    "MAX_HEAD_DIM",
    "cuda_limit",
    "dense_attention",
    "missing_device_kernel",
    "missing_fused_kernel",
    "missing_kernel",
    "missing_linear_kernel",
    "over_plan",
    "under_autocast",
]

Segments = Sequence[tuple[Tensor, Tensor]]
"""(k, v) pairs of further keys and values."""

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_FUSED = ("adaln_modulate", "gate_residual", "gate_residual_norm", "qk_norm_rope")


def _devices(*operators: str) -> frozenset[str]:
    found = (
        frozenset(kernel["device"] for kernel in kernel_catalogue() if kernel["op"] == op and kernel["compiled"])
        for op in operators
    )
    return frozenset.intersection(*found) | {"meta"}  # shapes only, no kernel runs


FUSED_DEVICES = _devices(*_FUSED)
"""Device types that the fused operators run on; a constant, because compiled blocks read it."""
_LINEAR_DEVICES = _devices("linear_attention_state", "linear_attention_readout")


def missing_fused_kernel(x: Tensor) -> str | None:
    """Why the fused operators cannot run on x, or None when they can."""
    if x.dtype not in _DTYPES:
        return f"dtype {str(x.dtype).removeprefix('torch.')} has no fused kernel"
    return None if x.device.type in FUSED_DEVICES else f"device {x.device.type!r} has no fused kernel in this build"


@functools.cache
def missing_device_kernel(device_type: str) -> str | None:
    """Why tensors of this device type cannot be served, or None when they can."""
    if device_type == "cpu":  # part of every build
        return None
    compiled = {kernel["device"] for kernel in kernel_catalogue() if kernel["op"] == "attention" and kernel["compiled"]}
    return None if device_type in compiled else f"device {device_type!r} has no attention kernel in this build"


def missing_kernel(q: Tensor, short: bool = False) -> str | None:
    """Why this call cannot be served, or None when it can. ``short``: by ``short_attention``."""
    if q.dtype not in _DTYPES:
        return f"dtype {str(q.dtype).removeprefix('torch.')} has no kernel"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} > {MAX_HEAD_DIM}"
    limited = q.is_cuda and not short
    return missing_device_kernel(q.device.type) or (cuda_limit(q.dtype, q.shape[-1]) if limited else None)


def missing_linear_kernel(q: Tensor) -> str | None:
    """Why linear attention of this call cannot be served, or None when it can."""
    if q.dtype not in _DTYPES:
        return f"dtype {str(q.dtype).removeprefix('torch.')} has no kernel"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} > {MAX_HEAD_DIM}"
    known = q.device.type in _LINEAR_DEVICES
    return None if known else f"device {q.device.type!r} has no kernel of linear attention in this build"


def cuda_limit(dtype: torch.dtype, head_dim: int) -> str | None:
    """What the CUDA kernel cannot take of what the CPU kernel can, or None."""
    if dtype == torch.float32:
        return "float32 has no CUDA kernel, use bfloat16 or float16"
    return None if head_dim % 8 == 0 else f"head dimension {head_dim} is not a multiple of 8"


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device; the meta device, where only shapes are computed, knows none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float | None = None,
    mask: Tensor | None = None,
    segments: Segments = (),
) -> Tensor:
    """Dense attention by torch in the stock models' form: q [B,L,H,D], k, v [B,L,Hkv,D], and either kv_len int [B] or
    a mask that broadcasts to [B,H,L,L], or none. Segments [B or 1, S, Hkv, D] are read by every query."""
    if kv_len is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < kv_len.view(-1, 1)).view(-1, 1, 1, k.shape[1])
    if segments:
        extra = sum(segment.shape[1] for segment, _ in segments)
        k, v = (
            torch.cat([x, *(pair[i].expand(x.shape[0], -1, -1, -1) for pair in segments)], dim=1)
            for i, x in enumerate((k, v))
        )
        mask = None if mask is None else functional.pad(mask, (0, extra), value=True)
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def over_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    scale: float | None,
    plan: AttentionPlan | None,
    segments: Segments = (),
) -> Tensor:
    """Attention of q [B,L,H,D] over a plan, by torch where there is no kernel."""
    if missing_kernel(q) is None:
        return cast(Tensor, attention(q, k, v, plan, kv_len=kv_len, scale=scale, segments=segments))
    mask = None if plan is None else plan.to_mask()
    if mask is not None and kv_len is not None:
        mask = mask & (torch.arange(k.shape[1], device=k.device) < kv_len.view(-1, 1)).view(-1, 1, 1, k.shape[1])
        kv_len = None
    return dense_attention(q, k, v, kv_len, scale, mask, segments)
