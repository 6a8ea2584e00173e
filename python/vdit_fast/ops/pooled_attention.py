"""Attention of every query over average-pooled keys and values."""

from __future__ import annotations

import itertools
import math
from typing import cast

from torch import Tensor

from .attention import attention
from .merge import merge


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    cell: tuple[int, int, int],
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention in which one mean key and value stands for each cell of tokens (Context Drop of Lumina-Next,
    arXiv 2406.18583).

    Exact where keys and values are constant inside every cell. Cells that the grid's border cuts count by their tokens:
    their scores carry the logarithm of how many they stand for. With cells of c tokens, scores and softmax cost 1 / c.
    Differentiable in q, k and v.

    Args:
        q: [B, Nq, H, D], any number of queries.
        k, v: [B, N, Hkv, D], N the tokens of ``grid``, row-major; H a multiple of Hkv.
        grid: (frames, height, width) in tokens.
        cell: tokens per cell on every axis; (1, 2, 2) pools four tokens of a frame.
        scale: multiplies the scores; default D ** -0.5.

    Returns:
        [B, Nq, H, D] in q's dtype.

    Raises:
        ValueError: the grid does not fit k and v, or a cell is smaller than 1 or larger than the grid.
    """
    if k.dim() != 4 or k.shape != v.shape or k.shape[1] != math.prod(grid):
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must both be [B, N, Hkv, D] with the {math.prod(grid)} tokens of "
            f"grid {tuple(grid)}"
        )
    if len(cell) != 3 or any(not 1 <= size <= whole for size, whole in zip(cell, grid, strict=True)):
        raise ValueError(f"cell {tuple(cell)} must hold 3 sizes from 1 to those of the grid {tuple(grid)}")
    parts = [_parts(whole, size) for whole, size in zip(grid, cell, strict=True)]
    groups = list(itertools.product(*parts))  # cells of one size each: the whole ones, and those at the borders
    if len(groups) == 1:
        return cast(Tensor, attention(q, _pool(k, grid, groups[0]), _pool(v, grid, groups[0]), scale=scale))
    outs, lses = [], []
    for group in groups:
        out, lse = attention(q, _pool(k, grid, group), _pool(v, grid, group), scale=scale, return_lse=True)
        outs.append(out)
        lses.append(lse + math.log(math.prod([size for _, size in group])))
    return merge(outs, lses)[0]


_Part = tuple[slice, int]


def _parts(whole: int, size: int) -> list[_Part]:
    """An axis cut into its full cells and the rest, each with the size of its cells."""
    rest = whole % size
    return [(slice(0, whole - rest), size)] + ([(slice(whole - rest, whole), rest)] if rest else [])


def _pool(x: Tensor, grid: tuple[int, int, int], group: tuple[_Part, ...]) -> Tensor:
    """Mean tokens [B, cells, H, D] of one group of cells."""
    block = x.unflatten(1, grid)[:, group[0][0], group[1][0], group[2][0]]
    for axis, (_, size) in zip((3, 2, 1), reversed(group), strict=True):  # last axis first: the others keep their place
        block = block.unflatten(axis, (-1, size))
    return block.float().mean((2, 4, 6)).to(x.dtype).flatten(1, 3)
