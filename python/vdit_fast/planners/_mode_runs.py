"""What the modes of Sparse-vDiT read, on the host: each mode's runs once, then the heads of a row put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan


@dataclass(frozen=True, eq=False)
class HeadRuns:
    """What one head reads, in the form of a plan and heaviest tiles first.

    tiles: int32 [T, 2], first row and rows.       work: int64 [T], pairs of a tile.
    counts: int64 [T], runs of a tile.             runs: int32 [R, 3], tile after tile.
    """

    tiles: Tensor
    work: Tensor
    counts: Tensor
    runs: Tensor

    @classmethod
    def of(cls, plan: AttentionPlan) -> HeadRuns:
        """From a plan of one head on the CPU, without unused capacity."""
        tiles = plan.tiles[plan.tiles[:, 2] > 0]
        ends = plan.run_ptr[: len(tiles) + 1].long()
        runs = plan.runs[: ends[-1]]
        keys = torch.nn.functional.pad(runs[:, 1].long().cumsum(0), (1, 0))
        work = (keys[ends[1:]] - keys[ends[:-1]]) * tiles[:, 2]
        return cls(tiles[:, 1:].contiguous(), work, ends.diff(), runs)


def join(heads: Sequence[HeadRuns], tokens: int) -> AttentionPlan:
    """The plan of all heads, tile by tile what one compilation of their stacked block maps gives."""
    from ..plan import AttentionPlan

    sizes = torch.tensor([len(head.work) for head in heads])
    order = torch.cat([head.work for head in heads]).argsort(descending=True, stable=True)
    number = torch.arange(len(heads), dtype=torch.int32).repeat_interleave(sizes)[:, None]
    tiles = torch.cat([number, torch.cat([head.tiles for head in heads])], 1)[order]
    counts = torch.cat([head.counts for head in heads])
    first, counts = (counts.cumsum(0) - counts)[order], counts[order]
    ends = counts.cumsum(0)
    source = (first - ends + counts).repeat_interleave(counts)
    source += torch.arange(len(source))
    runs = torch.cat([head.runs for head in heads])[source]
    run_ptr = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    return AttentionPlan(1, len(heads), tokens, tokens, tiles, run_ptr, runs)


class Layout:
    """Blocks of one call's tokens: text, sink frames, and the rest of the video, on the host.

    Attributes:
        early, late: video tokens in the sink frames, and after them; stripes: blocks of the latter.
        q_len, kv_len: int64 block lengths of the whole sequence; q_whole: queries with all of the video as one block.
    """

    def __init__(self, ctx: LayerContext, block: int, sinks: int) -> None:
        frames, height, width = ctx.grid
        self.frames, self.sinks = frames, min(sinks, frames)
        self.tokens, self.block = ctx.num_tokens, block
        self.early = self.sinks * height * width
        self.late = ctx.n_video - self.early
        self.stripes = self.stripes_of(ctx.grid, sinks, block)
        self._text, self._first = int(ctx.text > 0), ctx.text_first
        self._q, self._k = (_pieces(n, block) for n in (ctx.n_video, self.late))
        early, text = torch.tensor([self.early]), torch.tensor([ctx.text] * self._text)
        video = (self._q, torch.tensor([ctx.n_video]), torch.cat([early, self._k]))
        sides = [(text, x) if ctx.text_first else (x, text) for x in video]
        self.q_len, self.q_whole, self.kv_len = (torch.cat(parts).long() for parts in sides)

    @staticmethod
    def stripes_of(grid: tuple[int, int, int], sinks: int, block: int) -> int:
        """Number of blocks after the sink frames."""
        return -(-max(grid[0] - sinks, 0) * grid[1] * grid[2] // block)

    def reads(self, late: bool | Tensor, q_len: Tensor, text: bool = True) -> HeadRuns:
        """A head's runs.

        Args:
            late: what the video reads of the blocks after the sinks, [1 or video q blocks, those blocks].
            q_len: ``q_len`` or ``q_whole``.
            text: whether text reads everything, and everything reads text and sinks.
        """
        from ..plan.builders import compile_map

        keep = torch.full((len(q_len), len(self.kv_len)), text)
        rows = slice(self._text, None) if self._first else slice(len(q_len) - self._text)
        first = self._text * self._first + 1
        keep[rows, first : first + self.stripes] = late
        return HeadRuns.of(compile_map(keep[None, None], q_len[None], self.kv_len[None], self.tokens, self.tokens))

    def band(self, width: float, *, token_major: bool) -> Tensor:
        """bool [video q blocks, blocks after the sinks]: centres at most ``width`` tokens apart, or overlapping.

        Token-major keys lack the sink frames, so a place has fewer of them than queries: positions are scaled. What a
        query block reads is one interval of key blocks, whose ends are searched.
        """
        scale = self.frames / max(self.frames - self.sinks, 1) if token_major else 1.0
        q_end = self._q.cumsum(0).double()
        k_end = self._k.cumsum(0).double() * scale + (0 if token_major else self.early)
        q_start, k_start = q_end - self._q, k_end - self._k * scale
        q_centre, k_centre, reach = q_start + q_end, k_start + k_end, 2 * width + 1e-6
        near = _between(k_centre, q_centre - reach, k_centre, q_centre + reach, touching=True)
        over = _between(k_end, q_start, k_start, q_end, touching=False)
        below = torch.ones(len(self._k) + 1, len(self._k), dtype=torch.bool).tril(-1)  # row i: the blocks before i
        return (below[near[1]] & ~below[near[0]]) | (below[over[1]] & ~below[over[0]])


def _between(low: Tensor, floor: Tensor, high: Tensor, ceiling: Tensor, *, touching: bool) -> tuple[Tensor, Tensor]:
    """First and past-the-last index with floor < low and high < ceiling (≤ where touching); low and high ascend."""
    return torch.searchsorted(low, floor, right=not touching), torch.searchsorted(high, ceiling, right=touching)


def _pieces(length: int, block: int) -> Tensor:
    """Lengths of equal blocks and a shorter tail."""
    return torch.tensor([min(block, length - start) for start in range(0, length, block)], dtype=torch.long)
