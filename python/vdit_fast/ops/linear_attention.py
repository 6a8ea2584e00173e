"""Non-causal linear attention: a state of fixed size in place of the matrix of weights."""

from __future__ import annotations

from torch import Tensor

from vdit_fast import reference

__all__ = ["FEATURE_MAPS", "linear_attention", "linear_attention_readout", "linear_attention_state"]

FEATURE_MAPS = ("hedgehog", "relu", "elu", "identity")


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
            q's dtype or float32; None: no projection.
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
    return reference.linear_attention_state(k, v, feature_map=feature_map, weight=weight, k_den=k_den, kv_len=kv_len)


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
    return reference.linear_attention_readout(q, state, feature_map=feature_map, weight=weight, q_den=q_den, eps=eps)
