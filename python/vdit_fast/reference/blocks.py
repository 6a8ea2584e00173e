"""Numbers per block of tokens: means, log-sum-exps of folded scores, attention mass between blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def block_mean(
    x: Tensor, lengths: Tensor, order: Tensor | None = None, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``ops.block_mean``; fp64 stays fp64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, tokens, heads, dim = x.shape
    blocks = lengths.shape[-1]
    place = torch.arange(tokens, device=x.device).expand(batch, heads, tokens)
    token = place if order is None else order.long().expand(batch, heads, tokens)
    ends = lengths.long().expand(batch, heads, blocks).cumsum(-1)
    block = torch.searchsorted(ends.contiguous(), place.contiguous(), right=True)  # `blocks`: in none
    if kv_len is not None:
        block = torch.where(token < kv_len.view(-1, 1, 1), block, blocks)
    rows = x.transpose(1, 2).to(dtype).gather(2, token[..., None].expand(-1, -1, -1, dim))
    rows = rows.masked_fill((block == blocks)[..., None], 0)
    total = rows.new_zeros(batch, heads, blocks + 1, dim)
    total.scatter_add_(2, block[..., None].expand(-1, -1, -1, dim), rows)
    count = torch.zeros(batch, heads, blocks + 1, dtype=torch.int32, device=x.device)
    count.scatter_add_(2, block, torch.ones_like(block, dtype=torch.int32))
    total, count = total[:, :, :blocks], count[:, :, :blocks]
    return total / count.clamp(min=1)[..., None], count


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
