"""Windows of tiles along the axes of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ._tokens import Axes

Widths = tuple[int, int, int]


def band(tiles: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """bool [tiles, tiles]: `width` tiles around each, shifted inward at the borders."""
    at = torch.arange(tiles, device=device)
    start = (at - width // 2).clamp(0, tiles - width)[:, None]
    return (at >= start) & (at < start + width)


def density(axes: Axes, width: Widths) -> float:
    """Pairs in the window / all pairs, exact for unequal pieces."""
    share = 1.0
    for pieces, w in zip(axes, width, strict=True):
        n = len(pieces)
        read = [sum(pieces[s : s + w]) for s in (min(max(i - w // 2, 0), n - w) for i in range(n))]
        share *= sum(p * r for p, r in zip(pieces, read, strict=True)) / sum(pieces) ** 2
    return share
