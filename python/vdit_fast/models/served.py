"""The attention call inside a processor: eager, compiled and differentiable.

A compiled block sees one opaque operator whose per-layer information is a tensor. A Python number per layer would
cost one graph per layer, and with ``fullgraph=True`` and more than eight layers an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.kernels import under_autocast
from vdit_fast.models.session import Geometry, session_by_id

__all__ = ["begin_forward", "served_attention"]


@torch.library.custom_op("vdit_fast::served_attention", mutates_args=())
def _served_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    handle: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    out = _run(q, k, v, kv_len, handle, None, scale, mask)
    return out.contiguous()


@_served_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    handle: Tensor,
    anchor: Tensor | None,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    session, layer = handle.tolist()
    return session_by_id(session).attend(layer, q, k, v, kv_len, anchor, scale, mask)


# Autograd must see the calls inside, so a compiled training graph is cut here.
_run_uncompiled = torch.compiler.disable(_run)


def served_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    *,
    kv_len: Tensor | None = None,
    anchor: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of one served layer.

    Args:
        q: [B, L, H, D] after norm and RoPE, the whole joint sequence.
        k, v: [B, L, Hkv, D], H a multiple of Hkv.
        handle: int64 CPU tensor (session id, layer index).
        kv_len: int [B], number of valid keys, None when all are.
        anchor: a tensor that the transformer makes anew in every forward and hands to every block; it tells
            forwards apart when gradient checkpointing runs a block again.
        scale: multiplies the scores; None is D ** -0.5.
        mask: bool [1, 1, L, L] of a transformer whose geometry has a ``frame_block``.

    Returns:
        [B, L, H, D] in q's dtype (the autocast dtype under autocast, as torch's own attention does).
    """
    if under_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _run_uncompiled(q, k, v, kv_len, handle, anchor, scale, mask)
        return torch.ops.vdit_fast.served_attention(q, k, v, kv_len, handle, scale, mask)
    return _run(q, k, v, kv_len, handle, anchor, scale, mask)


@torch.library.custom_op("vdit_fast::begin_forward", mutates_args=())
def _begin_op(timestep: Tensor, session: int, layout: list[int]) -> Tensor:
    session_by_id(session).begin(timestep, _geometry(layout))
    return timestep.clone()


@_begin_op.register_fake
def _(timestep: Tensor, session: int, layout: list[int]) -> Tensor:
    return torch.empty_like(timestep)


def _layout(geometry: Geometry | None) -> list[int]:
    """A geometry as the integers an operator takes; empty for None."""
    if geometry is None:
        return []
    text = -1 if geometry.text is None else geometry.text
    return [*geometry.grid, text, int(geometry.text_first), geometry.history, geometry.frame_block]


def _geometry(layout: list[int]) -> Geometry | None:
    if not layout:
        return None
    frames, height, width, text, text_first, history, frame_block = layout
    return Geometry((frames, height, width), None if text < 0 else text, bool(text_first), history, frame_block)


def begin_forward(session: Any, timestep: Any, geometry: Geometry | None) -> Any:
    """Note that a forward begins; returns the timestep the forward must use.

    When the whole transformer is compiled, the note is an operator on the timestep's own path, so that it runs
    once per forward and before every attention call. Otherwise the timestep comes back untouched.
    """
    if torch.compiler.is_compiling() and isinstance(timestep, Tensor):
        return torch.ops.vdit_fast.begin_forward(timestep, session.id, _layout(geometry))
    session.begin(timestep, geometry)
    return timestep
