"""Whether labels are those of the nearest centroids."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(x: Tensor, centroids: Tensor, labels: Tensor) -> None:
    """The chosen distance is the smallest up to fp32 rounding; where it is the smallest by far, so is the label."""
    c = centroids.to(x.dtype).double()
    products = x.double().transpose(1, 2) @ c.mT
    distance = c.square().sum(-1)[:, :, None] - 2 * products
    # A sum of D products in any order, and the subtraction: D + 2 roundings of at most this magnitude.
    size = c.square().sum(-1)[:, :, None] + 2 * x.double().abs().transpose(1, 2) @ c.abs().mT
    bound = (x.shape[-1] + 2) * torch.finfo(torch.float32).eps * size
    assert labels.dtype == torch.int32 and labels.is_contiguous() and labels.shape == distance.shape[:-1]
    chosen = labels.long()[..., None]
    chosen_bound = bound.gather(-1, chosen)
    assert (distance.gather(-1, chosen) - chosen_bound <= distance + bound).all()
    best, index = distance.min(-1)
    others = distance.scatter(-1, index[..., None], torch.inf)
    separated = (others - bound > best[..., None] + bound.gather(-1, index[..., None])).all(-1)
    assert torch.equal(labels[separated], index.to(torch.int32)[separated])
    if labels.numel() > 100 and c.shape[2] > 1:
        assert separated.double().mean() > 0.5, "the inputs hardly test the labels"
