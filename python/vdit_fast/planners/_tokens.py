"""Token geometry shared by planners: cut the video grid into tiles, order tokens tile by tile, pool tokens per tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..context import LayerContext

TEXT_BLOCK = 128
"""Longest block of text rows: text queries read everything, so they are cut like ordinary query tiles."""

Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Piece lengths along the frame, row and column axis."""


def cut(length: int, size: int) -> tuple[int, ...]:
    """As few pieces of at most `size` as possible, nearly equal: cut(45, 8) = (8, 8, 8, 7, 7, 7)."""
    pieces = -(-length // size)
    base, more = divmod(length, pieces)
    return (base + 1,) * more + (base,) * (pieces - more)


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
        index = torch.arange(len(axes[0]) * len(axes[1]) * len(axes[2]), device=device)
        label = index.view([len(axes[i]) for i in major]).permute([major.index(i) for i in range(3)])
        for axis, lengths in enumerate(pieces):
            label = torch.repeat_interleave(label, lengths, dim=axis, output_size=sum(axes[axis]))
        order = torch.argsort(label.flatten(), stable=True)
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


def video_tokens(x: Tensor, ctx: LayerContext) -> Tensor:
    """The video part of a joint sequence: [B, N, H, D] → view [B, F, h, w, H, D]."""
    first = ctx.text if ctx.text_first else 0
    return x.narrow(1, first, ctx.n_video).unflatten(1, tuple(ctx.grid))


def pool(x: Tensor, axes: Axes, sizes: Tensor) -> Tensor:
    """Mean of the tokens of every tile; `sizes` fp32 [tiles] are the tiles' token counts.

    [B, F, h, w, H, D] of any dtype and strides → fp32 [B, H, tiles, D], tiles in (t, y, x) order.
    """
    total = x
    for axis in (1, 2, 0):  # rows first: their sums are the longest contiguous ones
        total = _sum_pieces(total, axis + 1, axes[axis])
    return total.flatten(1, 3).transpose(1, 2) / sizes[:, None]


def _sum_pieces(x: Tensor, dim: int, pieces: tuple[int, ...]) -> Tensor:
    """Sums along `dim` over consecutive pieces of at most two lengths, as `cut` makes them."""
    if pieces[0] == 1:
        return x.float()
    parts, start = [], 0
    for size in dict.fromkeys(pieces):
        count = pieces.count(size)
        part = x.narrow(dim, start, count * size).unflatten(dim, (count, size))
        parts.append(part.sum(dim + 1, dtype=torch.float32))
        start += count * size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def stretches(
    n_video: int,
    block: int,
    *,
    text: int = 0,
    text_first: bool = False,
    sinks: int = 0,
    device: torch.device | str | None = None,
) -> Tiling:
    """Cut the joint sequence in its own order: stretches of `block` video tokens, the last maybe shorter; text apart.

    `sinks` counts tokens: stretches that begin before it are sinks. `order` is the identity, which a plan need not be
    given. Nothing is copied from the host.
    """
    with torch.inference_mode(False):
        starts = torch.arange(0, n_video, block, device=device)
        lengths, sink, first = (n_video - starts).clamp(max=block), starts < sinks, 0
        tiles = lengths.numel()
        if text:
            words = (text - torch.arange(0, text, TEXT_BLOCK, device=device)).clamp(max=TEXT_BLOCK)
            none = torch.zeros_like(words, dtype=torch.bool)
            first = words.numel() if text_first else 0
            lengths = torch.cat([words, lengths] if text_first else [lengths, words])
            sink = torch.cat([none, sink] if text_first else [sink, none])
        order = torch.arange(n_video + text, dtype=torch.int32, device=device)[None, None]
        return Tiling(order, lengths, slice(first, first + tiles), sink)
