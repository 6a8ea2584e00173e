"""Windows of tiles along the axes of the grid, and the width of a band."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._tokens import Axes

if TYPE_CHECKING:
    from ..context import LayerContext

Widths = tuple[int, int, int]


def band(tiles: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """bool [tiles, tiles]: `width` tiles around each, shifted inward at the borders."""
    at = torch.arange(tiles, device=device)
    start = (at - width // 2).clamp(0, tiles - width)[:, None]
    return (at >= start) & (at < start + width)


def tile_map(
    axes: Axes, width: Widths, device: torch.device | str | None = None, major: tuple[int, int, int] = (0, 1, 2)
) -> Tensor:
    """bool [tiles, tiles]: the window of `width` tiles around each tile; `major` orders the tiles as in `tiling`."""
    t, y, x = (band(len(pieces), w, device) for pieces, w in zip(axes, width, strict=True))
    keep = t[:, None, None, :, None, None] & y[:, None, None, :, None] & x[:, None, None, :]
    return keep.permute(*major, *(3 + axis for axis in major)).flatten(3).flatten(0, 2)


def band_width(sparsity: float, ctx: LayerContext) -> float:
    """Half the width, in tokens, of the band around the diagonal that drops `sparsity` of all pairs, text included.

    N (1 − √(1 − s')), s' = 1 − sparsity − 2 · text / N (Sparse VideoGen's closed form, arXiv 2502.01776); everything
    is within N.
    """
    if sparsity == 0:
        return float(ctx.num_tokens)  # the text's share is no reason to drop anything
    share = max(1 - sparsity - 2 * ctx.text / ctx.num_tokens, 0.0)
    return ctx.num_tokens * (1 - math.sqrt(1 - share))


def density(axes: Axes, width: Widths) -> float:
    """Pairs in the window / all pairs, exact for unequal pieces."""
    share = 1.0
    for pieces, w in zip(axes, width, strict=True):
        n = len(pieces)
        read = [sum(pieces[s : s + w]) for s in (min(max(i - w // 2, 0), n - w) for i in range(n))]
        share *= sum(p * r for p, r in zip(pieces, read, strict=True)) / sum(pieces) ** 2
    return share
