"""Attention over very many very short sequences, written as the formula."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(q: Tensor, k: Tensor, causal: bool, kv_len: Tensor | None) -> Tensor:
    """Bool ``[1 or B, 1, 1, Lq, Lk]``: which keys a row of q [B, Lq, S, H, D] reads of k [B, Lk, S, H, D]."""
    lq, lk = q.shape[1], k.shape[1]
    key = torch.arange(lk, device=q.device)
    reads = torch.ones(1, 1, 1, lq, lk, dtype=torch.bool, device=q.device)
    if causal:
        reads = reads & (key <= torch.arange(lq, device=q.device)[:, None] + (lk - lq))
    if kv_len is not None:
        reads = reads & (key < kv_len.view(-1, 1, 1, 1, 1))
    return reads


def weights(query: Tensor, key: Tensor, scale: float, reads: Tensor) -> Tensor:
    """Softmax weights ``[B, S, H, Lq, Lk]`` of query [B, S, H, Lq, D] and key [B, S, H, Lk, D]; 0 in empty rows."""
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~reads, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty | ~reads, 0)


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Softmax attention along dimension 1, for every batch item, place and head on its own.

    Args:
        q: ``[B, Lq, S, H, D]`` or ``[B, Lq, H, D]``. 16-bit inputs are computed in fp32, fp64 stays fp64.
        k, v: ``[B, Lk, S, H, D]`` or ``[B, Lk, H, D]``.
        causal: row i reads the keys ``j <= i + Lk - Lq``.
        scale: factor on the scores, default ``D ** -0.5``.
        kv_len: int32 or int64 ``[B]``; keys ``j >= kv_len[b]`` are not read.

    Returns:
        q's shape and dtype. Rows without keys, or with keys of score -inf only, give 0; unread keys reach no row.
    """
    if q.dim() == 4:
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        return short_attention(q, k, v, causal=causal, scale=scale, kv_len=kv_len).squeeze(2)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    reads = readable(q, k, causal, kv_len)
    query, key, value = (x.to(dtype).movedim(1, 3) for x in (q, k, v))  # [B, S, H, L, D]
    if k.shape[1] == 1:
        out = torch.where(reads, value, torch.zeros((), dtype=dtype, device=q.device))
    else:
        p = weights(query, key, scale, reads)
        # 0 * NaN is NaN: values that are not finite are added by hand, where the row reads them.
        out = p @ value.nan_to_num(0, 0, 0)
        odd = value - value.nan_to_num(0, 0, 0)  # 0, NaN or infinity
        if bool((odd != 0).any()):
            products = torch.where(reads[..., None], p[..., None] * odd.unsqueeze(-3), 0)
            out = out + products.sum(-2)
    return out.movedim(3, 1).to(q.dtype)
