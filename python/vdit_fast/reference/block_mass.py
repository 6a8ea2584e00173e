"""Log-sum-exps of (folded) scores, and attention mass between blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def score_lse(
    q: Tensor, k: Tensor, *, scale: float | None = None, fold: int = 1, kv_len: Tensor | None = None
) -> Tensor:
    """See ``ops.score_lse``; fp64 stays fp64."""
    return torch.logsumexp(folded_scores(q, k, scale, fold, kv_len), -1)


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
) -> Tensor:
    """See ``ops.block_mass``; fp64 stays fp64."""
    scores = folded_scores(q, k, scale, fold, kv_len)
    weight = (scores - lse.to(scores.dtype)[..., None]).exp()
    weight = weight.masked_fill((scores == -torch.inf) | (lse == -torch.inf)[..., None], 0)
    rows, columns = weight.shape[-2:]
    weight = torch.nn.functional.pad(weight, (0, -columns % kv_block, 0, -rows % q_block))
    return weight.unflatten(3, (-1, kv_block)).sum(-1).unflatten(2, (-1, q_block)).sum(3)


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
) -> Tensor:
    """See ``ops.softmax_mass``; fp64 stays fp64."""
    valid = torch.full((q.shape[0],), q.shape[1], device=q.device) if q_len is None else q_len
    dead = torch.arange(q.shape[1], device=q.device) >= valid[:, None]
    q = q.masked_fill(dead[..., None, None], 0)
    lse = score_lse(q, k, scale=scale, fold=fold, kv_len=kv_len).masked_fill(dead[..., None, ::fold], -torch.inf)
    return block_mass(q, k, lse, q_block, kv_block, scale=scale, fold=fold, kv_len=kv_len)


def folded_scores(q: Tensor, k: Tensor, scale: float | None, fold: int, kv_len: Tensor | None) -> Tensor:
    """Scaled scores [B, H, ceil(Lq / fold), ceil(Lk / fold)] of folded rows (``ops.score_lse``), -inf for padding."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 / fold if scale is None else scale
    valid = torch.arange(k.shape[1], device=k.device).expand(k.shape[0], -1)
    valid = valid < (k.shape[1] if kv_len is None else kv_len.view(-1, 1))
    k = k.to(dtype).masked_fill(~valid[..., None, None], 0).repeat_interleave(q.shape[2] // k.shape[2], 2)
    q, k = (torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % fold)) for x in (q, k))
    valid = torch.nn.functional.pad(valid, (0, -valid.shape[1] % fold)).unflatten(1, (-1, fold)).any(-1)
    q, k = q.unflatten(1, (-1, fold)).flip(2), k.unflatten(1, (-1, fold))
    scores = torch.einsum("bifhd,bjfhd->bhij", q, k) * scale
    return scores.masked_fill(~valid[:, None, None], -torch.inf)
