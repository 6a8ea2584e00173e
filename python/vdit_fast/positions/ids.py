"""Position ids of token grids: one row of ids per token, one column per axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MarkedSequence", "extended_ids", "grid_ids", "marked_sequence"]


def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    """The grid as a tuple. Raises TypeError or ValueError when a size is no integer of at least 1."""
    sizes = tuple(grid)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"grid must hold integers, such as (frames, height, width), got {grid!r}")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"grid must hold at least one size, all of them at least 1, got {grid!r}")
    return sizes


def grid_ids(grid: Sequence[int], *, start: Sequence[int] | None = None, device: torch.device | str = "cpu") -> Tensor:
    """The ids that models give a grid of tokens: every token's coordinates, row-major.

    Args:
        grid: tokens per axis, such as (frames, height, width); any number of axes.
        start: id of the first token on every axis; 0 by default.

    Returns:
        int64 [N, axes], N the product of ``grid``.

    Raises:
        TypeError, ValueError: the grid is not made of integers of at least 1, or ``start`` has another number of axes.
    """
    sizes = check_grid(grid)
    offset = (0,) * len(sizes) if start is None else tuple(start)
    if len(offset) != len(sizes):
        raise ValueError(f"start {offset} must have one entry for each of the {len(sizes)} axes of grid {sizes}")
    axes = [torch.arange(first, first + size, device=device) for first, size in zip(offset, sizes, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def extended_ids(
    grid: tuple[int, int, int], streams: int = 2, *, frame_major: bool = False, device: torch.device | str = "cpu"
) -> Tensor:
    """Ids of several videos in one sequence that never coincide (GenCompositor's ERoPE, arXiv 2509.02460).

    The streams lie below each other in one tall grid of ``streams * height`` rows: token (h, w) of frame f of stream s
    gets (f, s * height + h, w).

    The released checkpoint was trained with another order: its table of the tall grid was flattened frame by frame and
    handed out row by row to [all of stream 0, all of stream 1]. ``frame_major=True`` gives those ids (our reading of
    the code: for two streams and an even number of frames, frame f of the video gets (f // 2, h + height * (f % 2), w),
    and the foreground continues at frames / 2). Ids belong to a checkpoint: take those it was trained with.

    Args:
        grid: (frames, height, width) of one stream.
        streams: number of streams.
        frame_major: hand the tall grid's rows out in its own order.

    Returns:
        int64 [streams * N, 3], stream after stream.
    """
    frames, height, width = check_grid(grid)
    (count,) = check_grid((streams,))
    tall = grid_ids((frames, count * height, width), device=device)
    if frame_major:
        return tall
    return tall.view(frames, count, height * width, 3).transpose(0, 1).reshape(-1, 3)


@dataclass(frozen=True)
class MarkedSequence:
    """Where the tokens of a video lie in a sequence with marker tokens.

    All are int64 indices into the marked sequence; together they list every place once.
    """

    video: Tensor
    """[N] places of the video tokens, row-major."""
    lines: Tensor
    """[frames * height] places of the ``[nextline]`` tokens."""
    frames: Tensor
    """[frames] places of the ``[nextframe]`` tokens, empty without them."""

    @property
    def length(self) -> int:
        """Tokens of the marked sequence."""
        return len(self.video) + len(self.lines) + len(self.frames)

    @property
    def ids(self) -> Tensor:
        """int64 [length, 1]: the one axis of Flag-DiT counts markers as it counts tokens."""
        return torch.arange(self.length, device=self.video.device).unsqueeze(1)

    def insert(self, video: Tensor, line: Tensor, frame: Tensor | None = None) -> Tensor:
        """The marked sequence [B, length, C] of tokens [B, N, C] and the learned markers [C]."""
        out = video.new_empty(video.shape[0], self.length, video.shape[2])
        out[:, self.video], out[:, self.lines] = video, line.to(video.dtype)
        if len(self.frames):
            if frame is None:
                raise ValueError("frame: the sequence has [nextframe] tokens; pass the learned marker [C]")
            out[:, self.frames] = frame.to(video.dtype)
        return out


def marked_sequence(
    grid: tuple[int, int, int], *, frame_markers: bool = True, device: torch.device | str = "cpu"
) -> MarkedSequence:
    """Flag-DiT's layout (Lumina-T2X, arXiv 2405.05945): ``[nextline]`` ends every row, ``[nextframe]`` every frame.

    Args:
        grid: (frames, height, width) in tokens.
        frame_markers: False leaves ``[nextframe]`` out, as the text-to-image model does.
    """
    frames, height, width = check_grid(grid)
    row, per_frame = width + 1, height * (width + 1) + int(frame_markers)
    places = torch.arange(frames * per_frame, device=device).view(frames, per_frame)
    rows = places[:, : height * row].reshape(frames, height, row)
    return MarkedSequence(rows[..., :-1].flatten(), rows[..., -1].flatten(), places[:, height * row :].flatten())
