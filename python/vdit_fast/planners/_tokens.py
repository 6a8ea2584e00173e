"""Token geometry shared by planners: cut the video grid into tiles, order tokens tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TEXT_BLOCK = 128
"""Longest block of text rows: text queries read everything, so they are cut like ordinary query tiles."""

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Piece lengths along the frame, row and column axis."""


def cut(length: int, size: int) -> tuple[int, ...]:
    """As few pieces of at most `size` as possible, nearly equal: cut(45, 8) = (8, 8, 8, 7, 7, 7)."""
    pieces = -(-length // size)
    base, more = divmod(length, pieces)
    return (base + 1,) * more + (base,) * (pieces - more)


def tile_labels(
    axes: Axes, major: tuple[int, int, int] = (0, 1, 2), device: torch.device | str | None = None
) -> Tensor:
    """The tile of every video token, int64 [n_video]; `major` numbers the tiles as in `tiling`."""
    label = torch.arange(len(axes[0]) * len(axes[1]) * len(axes[2]), device=device)
    label = label.view([len(axes[i]) for i in major]).permute([major.index(i) for i in range(3)])
    for axis, pieces in enumerate(axes):
        lengths = torch.tensor(pieces, device=device)
        label = torch.repeat_interleave(label, lengths, dim=axis, output_size=sum(pieces))
    return label.flatten()


@dataclass(frozen=True, eq=False)
class Tiling:
    """The joint sequence cut into blocks: video tiles one after the other, and text blocks before or after them.

    order: int32 [1, 1, N]; position p of the tile-major sequence holds original token order[p].
    lengths: int64 [blocks], on the same device as `order`.
    video: which blocks are video tiles.      sink: bool [blocks], tiles that touch the first `sinks` frames.
    """

    order: Tensor
    lengths: Tensor
    video: slice
    sink: Tensor

    @property
    def blocks(self) -> int:
        return self.lengths.numel()

    def complete(self, keep: Tensor) -> Tensor:
        """bool [..., tiles, tiles] of video tiles → [..., blocks, blocks] with sinks and dense text rows, columns."""
        if self.video == slice(0, self.blocks):
            return keep | self.sink
        full = keep.new_ones((*keep.shape[:-2], self.blocks, self.blocks))
        full[..., self.video, self.video] = keep | self.sink[self.video]
        return full


def tiling(
    axes: Axes,
    *,
    major: tuple[int, int, int] = (0, 1, 2),
    text: int = 0,
    text_first: bool = False,
    sinks: int = 0,
    device: torch.device | str | None = None,
) -> Tiling:
    """Cut a grid whose frame, row and column axes are cut into the given piece lengths.

    `major` lists the axes from the slowest to the fastest in the order of the tiles: (0, 1, 2) walks a frame after
    the other, (1, 2, 0) walks all frames of one place before the next place. Inside a tile the tokens keep their (t,
    y, x) order.
    """
    # ordinary (not inference) tensors: the result is kept and may be saved for a backward later
    with torch.inference_mode(False):
        pieces = [torch.tensor(p, device=device) for p in axes]
        order = torch.argsort(tile_labels(axes, major, device), stable=True)
        size = pieces[0][:, None, None] * pieces[1][:, None] * pieces[2]
        lengths = size.permute(major).flatten()
        early = (pieces[0].cumsum(0) - pieces[0] < sinks)[:, None, None].expand(size.shape)
        sink = early.permute(major).flatten()
        tiles, first = lengths.numel(), 0
        if text:
            words = torch.arange(text, device=device)
            chunks = torch.tensor(cut(text, TEXT_BLOCK), device=device)
            none = torch.zeros(chunks.numel(), dtype=torch.bool, device=device)
            if text_first:
                first = chunks.numel()
                order = torch.cat([words, order + text])
                lengths, sink = torch.cat([chunks, lengths]), torch.cat([none, sink])
            else:
                order = torch.cat([order, words + order.numel()])
                lengths, sink = torch.cat([lengths, chunks]), torch.cat([sink, none])
        return Tiling(order.to(torch.int32)[None, None], lengths, slice(first, first + tiles), sink)
