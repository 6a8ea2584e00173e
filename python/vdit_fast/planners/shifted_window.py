"""Shifted window attention: windows that attend to themselves, in every other layer half a window further on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._tokens import Axes, tiling
from ._windows import Widths
from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan

Q_TILE = 128
"""Most rows per tile of the plan: a window of thousands of tokens is the work of several thread blocks."""


@dataclass(frozen=True, kw_only=True)
class ShiftedWindow(Planner):
    """Window attention of StreamDiT (Kodaira et al., arXiv 2507.03745).

    Even layers cut the grid at multiples of the window, odd layers half a window further on, so that what one layer
    parts the next one joins. Windows do not wrap around the borders: those of odd layers are cut off there, down to an
    eighth of a whole one in the corners. (Wrapping would let the first frame read the last one. The paper does not say
    which it does.) An axis that one window covers is never shifted.

    Knobs besides those of `Planner`:
        window: (frames, rows, columns) in tokens; 0, or more than there are, means the whole axis. None: from
            `sparsity` (the paper's sizes are not published).
        sparsity: fraction of the video-to-video pairs to drop in even layers, in [0, 1), met as nearly as nearly equal
            windows allow. Text and sinks are kept on top. Without effect when `window` is given.
        shift: whether odd layers are shifted.

    Raises:
        ValueError, TypeError: a bad knob.
    """

    name: ClassVar[str] = "shifted_window"

    window: Widths | None = None
    sparsity: float = 0.75
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            self._set("window", _checks.counts("window", self.window, 3, least=0))
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("shift", _checks.switch("shift", self.shift))

    def widths(self, grid: tuple[int, int, int]) -> Widths:
        """The window in tokens, as used for this grid."""
        if self.window is None:
            return _nearest(grid, 1 - self.sparsity)
        t, y, x = (min(w, n) or n for w, n in zip(self.window, grid, strict=True))
        return t, y, x

    def axes(self, grid: tuple[int, int, int], layer: int) -> Axes:
        """Window lengths along the frame, row and column axis in a layer."""
        odd = self.shift and layer % 2 == 1
        t, y, x = (_cut(n, w, w // 2 if odd and w < n else 0) for n, w in zip(grid, self.widths(grid), strict=True))
        return t, y, x

    def decide(self, ctx: LayerContext) -> str | None:
        reason = super().decide(ctx)
        if reason is None and self.widths(ctx.grid) == tuple(ctx.grid):
            return "one window holds the whole grid"
        return reason

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan.builders import compile_map

        self.check_inputs(q, k, ctx)
        axes = self.axes(ctx.grid, ctx.layer)
        key = ("shifted_window plan", self, axes, ctx.text, ctx.text_first, q.device)
        if key not in ctx.static:
            with torch.inference_mode(False):
                tiles = tiling(axes, text=ctx.text, text_first=ctx.text_first, sinks=self.sinks, device=q.device)
                windows = math.prod(map(len, axes))
                keep = tiles.complete(torch.eye(windows, dtype=torch.bool, device=q.device))[None, None]
                lengths, n = tiles.lengths[None], ctx.num_tokens
                ctx.static[key] = compile_map(keep, lengths, lengths, n, n, tiles.order, tiles.order, q_tile=Q_TILE)
        plan: AttentionPlan = ctx.static[key]
        return plan


def _cut(length: int, window: int, shift: int) -> tuple[int, ...]:
    """Lengths between the borders at shift + k * window, without wrapping around."""
    borders = [0, *(b for b in range(shift, length, window) if b > 0), length]
    return tuple(end - start for start, end in itertools.pairwise(borders))


def _nearest(grid: tuple[int, int, int], target: float) -> Widths:
    """Of a chain of windows, the longest axis of the largest one cut into a piece more each time, the one of nearest
    density."""
    pieces, chain = [1, 1, 1], []
    while True:
        widths = [-(-n // p) for n, p in zip(grid, pieces, strict=True)]
        chain.append((widths[0], widths[1], widths[2]))
        if math.prod(_share(n, w) for n, w in zip(grid, widths, strict=True)) <= target or max(widths) == 1:
            break
        axis = widths.index(max(widths))
        pieces[axis] = -(-grid[axis] // (widths[axis] - 1))
    return min(
        chain,
        key=lambda window: abs(math.prod(_share(n, w) for n, w in zip(grid, window, strict=True)) - target),
    )


def _share(length: int, window: int) -> float:
    """Pairs in unshifted windows / all pairs, along one axis."""
    return sum(n * n for n in _cut(length, window, 0)) / length**2
