"""Which row of a modulation table each token takes: per frame, per coarse cell, per token.

A table of distinct rows [B, R, C] and an index replace scale, shift and gate tensors of one row per token: 4 bytes per
token instead of 2 C for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["coarse_rows", "frame_rows", "temporal_rows"]


def _check_sizes(name: str, sizes: tuple[int, ...]) -> None:
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"{name} must hold integers of at least 1, got {sizes!r}")


def frame_rows(grid: tuple[int, int, int], *, device: torch.device | str = "cpu") -> Tensor:
    """Every token takes its frame's row: one timestep per frame (FVDM, arXiv 2410.03160; condition frames at t = 0).

    Args:
        grid: (frames, height, width) in tokens.

    Returns:
        int32 [N], the frame of every token.
    """
    _check_sizes("grid", tuple(grid))
    frames, height, width = grid
    return torch.arange(frames, dtype=torch.int32, device=device).repeat_interleave(
        height * width, output_size=frames * height * width
    )


def temporal_rows(batch: int, frames: int, tokens: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Rows of temporal attention blocks, which see [batch * tokens, frames, C]: place after place over the frames.

    The table of all clips lies in one: [1, batch * frames, C], clip after clip.

    Args:
        batch: clips.
        frames: frames of a clip.
        tokens: tokens of a frame.

    Returns:
        int32 [batch * tokens, frames]: clip * frames + frame.
    """
    _check_sizes("batch, frames and tokens", (batch, frames, tokens))
    rows = torch.arange(batch * frames, dtype=torch.int32, device=device).view(batch, 1, frames)
    return rows.expand(-1, tokens, -1).reshape(batch * tokens, frames)


def coarse_rows(
    grid: tuple[int, int, int], coarse: tuple[int, int, int], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Every token takes the row of the coarse cell its centre lies in: conditions on a coarser grid than the tokens
    (ARLON, arXiv 2410.20502, injects coarse codes by adaptive norms).

    Args:
        grid: (frames, height, width) in tokens.
        coarse: (frames, height, width) of the conditions, at most the grid's sizes. Sizes need not divide each other.

    Returns:
        int32 [N], row-major index into the coarse grid. A grid that is its own coarse grid counts upwards; (1, 1, 1)
        is one row for all.

    Raises:
        ValueError: a size is no integer of at least 1, or the coarse grid is finer on an axis.
    """
    _check_sizes("grid", tuple(grid))
    _check_sizes("coarse", tuple(coarse))
    if any(few > many for few, many in zip(coarse, grid, strict=True)):
        raise ValueError(f"coarse {tuple(coarse)} must not be finer than grid {tuple(grid)}")
    index = torch.zeros(1, dtype=torch.int32, device=device)
    for few, many in zip(coarse, grid, strict=True):
        centre = (2 * torch.arange(many, dtype=torch.int64, device=device) + 1) * few // (2 * many)
        index = (index[:, None] * few + centre.to(torch.int32)).flatten()
    return index
