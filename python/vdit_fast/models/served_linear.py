"""Linear attention that a model has by itself, inside a processor: eager, compiled and differentiable.

As in ``served``, a compiled block sees one opaque operator whose per-layer information is a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.kernels import under_autocast
from vdit_fast.models.linear_layers import own_linear_attention
from vdit_fast.models.session import session_by_id

__all__ = ["served_linear_attention"]


@torch.library.custom_op("vdit_fast::served_linear_attention", mutates_args=())
def _served_op(
    q: Tensor, k: Tensor, v: Tensor, q_den: Tensor | None, k_den: Tensor | None, handle: Tensor, feature_map: str
) -> Tensor:
    return _run(q, k, v, q_den, k_den, handle, feature_map, None).contiguous()


@_served_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_den: Tensor | None,
    k_den: Tensor | None,
    handle: Tensor,
    feature_map: str,
    anchor: Tensor | None,
) -> Tensor:
    session, layer = handle.tolist()
    return own_linear_attention(
        session_by_id(session), layer, q, k, v, anchor, feature_map=feature_map, q_den=q_den, k_den=k_den
    )


# Autograd must see the calls inside, so a compiled training graph is cut here.
_run_uncompiled = torch.compiler.disable(_run)


def served_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    *,
    feature_map: str,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    anchor: Tensor | None = None,
) -> Tensor:
    """Linear attention of one served layer, by ``ops.linear_attention``.

    Args:
        q, k: [B, N, H, D], what the numerator's features are made of.
        v: [B, N, H, Dv].
        handle: int64 CPU tensor (session id, layer index).
        feature_map: how features are made, one without weights.
        q_den, k_den: of the shapes of q and k, what the denominator's features are made of; None: q and k.
        anchor: as in ``served.served_attention``.

    Returns:
        [B, N, H, Dv] in q's dtype (the autocast dtype under autocast).
    """
    if under_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        q_den, k_den = (x if x is None else x.to(dtype) for x in (q_den, k_den))
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return _run_uncompiled(q, k, v, q_den, k_den, handle, feature_map, anchor)
        return torch.ops.vdit_fast.served_linear_attention(q, k, v, q_den, k_den, handle, feature_map)
    return _run(q, k, v, q_den, k_den, handle, feature_map, anchor)
