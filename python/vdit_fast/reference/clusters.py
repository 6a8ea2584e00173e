"""k-means clusters of tokens, and the order that makes them contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """See ``ops.kmeans_assign``; fp64 stays fp64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    centres = centroids.to(x.dtype).to(dtype)
    distance = centres.square().sum(-1)[:, :, None] - 2 * x.transpose(1, 2).to(dtype) @ centres.mT
    return distance.argmin(-1).to(torch.int32)


def counting_sort(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """See ``ops.counting_sort``."""
    labels = labels.clamp(0, classes - 1)
    counts = torch.zeros(*labels.shape[:-1], classes, dtype=torch.int32, device=labels.device)
    counts.scatter_add_(-1, labels.long(), torch.ones_like(labels, dtype=torch.int32))
    return labels.argsort(dim=-1, stable=True).to(torch.int32), counts


def permute_tokens(x: Tensor, order: Tensor, *, inverse: bool = False) -> Tensor:
    """See ``ops.permute_tokens``."""
    batch, tokens, heads, dim = x.shape
    index = order.long().expand(batch, heads, tokens).transpose(1, 2)[..., None].expand(-1, -1, -1, dim)
    return torch.empty_like(x).scatter_(1, index, x) if inverse else x.gather(1, index)
