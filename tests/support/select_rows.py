"""Rows to select from, with everything that makes a selection hard."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("normal", "ties", "softmax", "wild", "constant", "tiny", "zeros and one")


def draw(kind: str, rows: int, n: int, seed: int = 0) -> Tensor:
    """float32 ``[rows, n]`` of one kind."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, n)
    if kind == "normal":
        return torch.randn(shape, generator=g)
    if kind == "ties":  # also between -0 and 0
        return torch.randint(-2, 3, shape, generator=g) * torch.randn(shape, generator=g).sign()
    if kind == "softmax":
        return torch.softmax(4 * torch.randn(shape, generator=g), -1)
    if kind == "wild":
        x = torch.randn(shape, generator=g)
        x[1::2] *= 1e-3
        specials = [torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-40, -1e-40, 300.0, 256.0]
        which = torch.randint(0, 2 * len(specials), shape, generator=g)
        for i, value in enumerate(specials):
            x[which == i] = value
        return x
    if kind == "constant":
        return torch.full(shape, 0.25)
    if kind == "tiny":  # around the unit of mass
        return torch.rand(shape, generator=g) * 2.0**-30
    assert kind == "zeros and one"
    x = torch.zeros(shape)
    x[torch.arange(rows), torch.randint(0, n, (rows,), generator=g)] = 1.0
    return x
