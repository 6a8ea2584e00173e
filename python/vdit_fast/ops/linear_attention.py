"""Non-causal linear attention: a state of fixed size in place of the matrix of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ._no_gradient import refuse_tangents
from .linear_attention_backward import FEATURE_MAPS

__all__ = ["FEATURE_MAPS", "linear_attention", "linear_attention_readout", "linear_attention_state"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    kv_len: Tensor | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """Normalised linear attention, ``out_i = phi(q_i) S / (phi(q_i) . z + eps)`` with ``S = sum_j phi(k_j)^T v_j`` and
    ``z = sum_j phi(k_j)``: cost and memory grow linearly with the lengths. Differentiable in everything but kv_len.

    Args:
        q: ``[B, Lq, H, D]``, float32, bfloat16 or float16, any strides with a contiguous last dimension, D at most 256.
        k, v: ``[B, Lk, Hkv, D]`` and ``[B, Lk, Hkv, Dv]`` of q's dtype, Dv at most 256; H is a multiple of Hkv.
        feature_map: ``"hedgehog"``: softmax(x W) and softmax(-x W) side by side, 2 D features (Hedgehog, arXiv
            2402.04347; LinVideo, arXiv 2510.08318); ``"relu"``; ``"elu"``: elu(x) + 1; ``"identity"``: D features.
        q_weight, k_weight: W of ``"hedgehog"``, ``[D, D]`` for all heads or ``[H, D, D]`` (``[Hkv, D, D]`` for k), of
            q's dtype or float32; None: no projection. On tensor cores features and weights are rounded to q's dtype.
        q_den, k_den: inputs of the denominator where they are not q and k, of the same shapes (Sana-Video rotates only
            what the numerator sees). They pass through the same map and weights.
        kv_len: int32 or int64 ``[B]``; keys ``j >= kv_len[b]`` do not count, whatever they hold.
        eps: added to the denominator, at least 0.

    Returns:
        ``[B, Lq, H, Dv]`` in q's dtype. 0 where the denominator with eps is exactly 0, as without any key.

    Raises:
        ValueError: an unknown feature map, or a weight without ``"hedgehog"``.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    if feature_map != "hedgehog":
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight is not None:
                raise ValueError(f'{name} is given, but feature_map is {feature_map!r}; only "hedgehog" has weights')
    state = linear_attention_state(k, v, feature_map=feature_map, weight=k_weight, k_den=k_den, kv_len=kv_len)
    return linear_attention_readout(q, state, feature_map=feature_map, weight=q_weight, q_den=q_den, eps=eps)


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    weight: Tensor | None = None,
    k_den: Tensor | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """What linear attention needs of keys and values. States of parts of a sequence add up to the state of the whole.

    Args:
        k, v, feature_map, k_den, kv_len: as in ``linear_attention``.
        weight: its ``k_weight``.

    Returns:
        float32 ``[B, Hkv, F, Dv + 1]``, F the number of features: ``sum_j phi(k_j)^T v_j``, and in the last column
        ``sum_j phi(k_den_j)``.

    Raises:
        as ``linear_attention``.
    """
    refuse_tangents("linear_attention_state", k, v, weight, k_den)
    state: Tensor = torch.ops.vdit_fast.linear_attention_state(k, v, _code(feature_map, weight), weight, k_den, kv_len)
    return state


def linear_attention_readout(
    q: Tensor,
    state: Tensor,
    *,
    feature_map: str = "hedgehog",
    weight: Tensor | None = None,
    q_den: Tensor | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """The rows of linear attention for queries and a state.

    Args:
        q, feature_map, q_den, eps: as in ``linear_attention``.
        state: float32 ``[B, Hkv, F, Dv + 1]`` of ``linear_attention_state``.
        weight: its ``q_weight``.

    Returns:
        ``[B, Lq, H, Dv]`` in q's dtype.

    Raises:
        as ``linear_attention``.
    """
    refuse_tangents("linear_attention_readout", q, state, weight, q_den)
    code = _code(feature_map, weight)
    return torch.ops.vdit_fast.linear_attention_readout(q, state.contiguous(), code, weight, q_den, eps)


def _code(feature_map: str, weight: Tensor | None) -> int:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map is {feature_map!r}; expected one of {', '.join(FEATURE_MAPS)}")
    if weight is not None and feature_map != "hedgehog":
        raise ValueError(f'weight is given, but feature_map is {feature_map!r}; only "hedgehog" has one')
    return FEATURE_MAPS.index(feature_map)


@torch.library.register_fake("vdit_fast::linear_attention_state")
def _fake_state(
    k: Tensor, v: Tensor, feature_map: int, weight: Tensor | None, k_den: Tensor | None, kv_len: Tensor | None
) -> Tensor:
    batch, _, heads, dim = k.shape
    features = 2 * dim if feature_map == 0 else dim
    return k.new_empty((batch, heads, features, v.shape[-1] + 1), dtype=torch.float32)


@torch.library.register_fake("vdit_fast::linear_attention_readout")
def _fake_readout(
    q: Tensor, state: Tensor, feature_map: int, weight: Tensor | None, q_den: Tensor | None, eps: float
) -> Tensor:
    return q.new_empty((*q.shape[:3], state.shape[-1] - 1))
