"""Normalised linear attention: the explicit matrix of weights, and the state that replaces it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["features", "linear_attention", "linear_attention_readout", "linear_attention_state"]


def features(x: Tensor, feature_map: str = "hedgehog", weight: Tensor | None = None) -> Tensor:
    """Features [B, L, H, F] of ``x`` [B, L, H, D]; fp64 stays fp64, everything else is fp32."""
    x = x.to(_dtype(x))
    if feature_map == "hedgehog":
        if weight is not None:
            weight = weight.to(x.dtype)
            x = x @ weight if weight.dim() == 2 else torch.einsum("blhd,hde->blhe", x, weight)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu":
        return torch.nn.functional.elu(x) + 1
    return x


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    weight: Tensor | None = None,
    k_den: Tensor | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """See ``ops.linear_attention_state``; fp64 stays fp64."""
    padding = _padding(k, kv_len)
    phi = features(k, feature_map, weight).masked_fill(padding, 0)
    sums = torch.einsum("blhf,blhv->bhfv", phi, v.to(phi.dtype).masked_fill(padding, 0))
    if k_den is not None:
        phi = features(k_den, feature_map, weight).masked_fill(padding, 0)
    return torch.cat([sums, phi.sum(1).unsqueeze(-1)], -1)


def linear_attention_readout(
    q: Tensor,
    state: Tensor,
    *,
    feature_map: str = "hedgehog",
    weight: Tensor | None = None,
    q_den: Tensor | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """See ``ops.linear_attention_readout``; fp64 stays fp64."""
    state = state.to(_dtype(q)).repeat_interleave(q.shape[2] // state.shape[1], 1)
    phi = features(q, feature_map, weight)
    numerator = torch.einsum("blhf,bhfv->blhv", phi, state[..., :-1])
    if q_den is not None:
        phi = features(q_den, feature_map, weight)
    denominator = torch.einsum("blhf,bhf->blh", phi, state[..., -1]).unsqueeze(-1) + eps
    out = numerator / denominator.masked_fill(denominator == 0, 1)
    return out.masked_fill(denominator == 0, 0).to(q.dtype)


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
    """See ``ops.linear_attention``, computed as written: with the matrix of all weights. fp64 stays fp64."""
    padding, group = _padding(k, kv_len), q.shape[2] // k.shape[2]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        phi_q = features(q, feature_map, q_weight)
        phi_k = features(k, feature_map, k_weight).masked_fill(padding, 0).repeat_interleave(group, 2)
        return torch.einsum("bihf,bjhf->bhij", phi_q, phi_k)

    numerator = scores(q, k)
    denominator = numerator if q_den is None and k_den is None else scores(_first(q_den, q), _first(k_den, k))
    total = denominator.sum(-1, keepdim=True) + eps
    weights = (numerator / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0)
    values = v.to(weights.dtype).masked_fill(padding, 0).repeat_interleave(group, 2)
    return torch.einsum("bhij,bjhv->bihv", weights, values).to(q.dtype)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _first(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x


def _padding(k: Tensor, kv_len: Tensor | None) -> Tensor:
    """bool [B, Lk, 1, 1]: keys that do not count."""
    at = torch.arange(k.shape[1], device=k.device).expand(k.shape[0], -1)
    end = torch.full((k.shape[0], 1), k.shape[1], device=k.device) if kv_len is None else kv_len.view(-1, 1)
    return (at >= end)[..., None, None]
