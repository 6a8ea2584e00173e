"""Selection of blocks by score or by mass, exact on every device: ties go to the lowest index, sums are integers."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**32
"""Masses are added up as integers of 1 / UNIT, so that no order of additions changes a selection."""
LARGEST = 2.0**40
"""Most units one entry counts for."""


def select_top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """See ``ops.select_top_k``."""
    order = _descending(scores)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    count = torch.as_tensor(k, device=scores.device)
    if count.dim():
        count = count.broadcast_to(scores.shape[:-1]).unsqueeze(-1)
    keep = (rank < count.clamp(min=1)).expand(scores.shape)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, keep)


def select_top_p(mass: Tensor, p: float, min_keep: int = 1) -> Tensor:
    """See ``ops.select_top_p``."""
    order = _descending(mass)
    units = mass.double().nan_to_num(0.0).clamp(0.0, LARGEST / UNIT).mul(UNIT).floor().long().gather(-1, order)
    total = units.sum(-1, keepdim=True)
    limit = (total.double() * p).long()
    rank = torch.arange(mass.shape[-1], device=mass.device)
    keep = (units.cumsum(-1) - units <= limit) | (rank < max(min_keep, 1)) | mass.gather(-1, order).isnan()
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, keep)


def _descending(values: Tensor) -> Tensor:
    """Indices from the largest value to the smallest: NaN first, equal values (also -0 and 0) by index."""
    return (values + 0.0).sort(dim=-1, descending=True, stable=True).indices
