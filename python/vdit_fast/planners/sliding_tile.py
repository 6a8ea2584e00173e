"""Sliding tile attention: every tile of the grid reads the tiles in a window around it, one window per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._tokens import Axes, cut, tiling
from ._windows import Widths, density, tile_map
from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan

Heads = tuple[Widths, ...]


@dataclass(frozen=True, kw_only=True)
class SlidingTile(Planner):
    """Sliding Tile Attention (Zhang et al., arXiv 2502.04507).

    The grid is cut into tiles, and tokens are ordered tile by tile. A query tile reads the key tiles of a window
    around it, whose centre is moved inward at the borders, so that every tile reads equally many. All heads run in
    one launch, each with its own window.

    Different from the authors' code: any grid (tiles of an axis differ by at most one token); text anywhere; a window
    of an even number of tiles reads just as many (theirs must be odd, or the whole axis).

    Knobs besides those of `Planner`:
        window: (frames, rows, columns) in tiles, for all heads; or a list of those, one per head; or a list of such
            lists, one per layer. 0, or more than there are, means the whole axis. None: from `sparsity`.
        sparsity: fraction of the video-to-video pairs to drop, in [0, 1), met as nearly as windows with odd sides
            allow. Text and sinks are kept on top. Without effect when `window` is given.
        tile: (tt, th, tw) in tokens; larger than the grid means the whole axis.

    Raises:
        ValueError, TypeError: a bad knob; in `plan`, a table for another number of layers or heads.
    """

    name: ClassVar[str] = "sliding_tile"

    window: Widths | Heads | tuple[Heads, ...] | None = None
    sparsity: float = 0.75
    tile: Widths = (6, 8, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("window", None if self.window is None else _table("window", self.window))
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("tile", _checks.counts("tile", self.tile, 3))

    def axes(self, grid: tuple[int, int, int]) -> Axes:
        """Piece lengths of the frame, row and column axis."""
        frames, height, width = (cut(n, size) for n, size in zip(grid, self.tile, strict=True))
        return frames, height, width

    def windows(self, ctx: LayerContext, heads: int) -> Heads:
        """The windows of this layer in tiles: one for all heads, or one per head."""
        axes = self.axes(ctx.grid)
        table: Any = self.window
        if table is None:
            return (_nearest(axes, 1 - self.sparsity),)
        if isinstance(table[0], int):
            table = (table,)
        else:
            if not isinstance(table[0][0], int):
                if len(table) != ctx.num_layers:
                    raise ValueError(f"window lists {len(table)} layers but the model has {ctx.num_layers}")
                table = table[ctx.layer]
            if len(table) != heads:
                raise ValueError(f"window lists {len(table)} heads but q has {heads}; give one window per head")
        full = tuple(map(len, axes))
        return tuple(
            (min(t, full[0]) or full[0], min(y, full[1]) or full[1], min(x, full[2]) or full[2]) for t, y, x in table
        )

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        self.check_inputs(q, k, ctx)
        windows = self.windows(ctx, ctx.all_heads(q.shape[2]))
        windows = tuple(ctx.own_heads(windows)) if len(windows) > 1 else windows
        key = ("sliding_tile plan", self, windows, tuple(ctx.grid), ctx.text, ctx.text_first, q.device)
        if key not in ctx.static:
            with torch.inference_mode(False):
                axes = self.axes(ctx.grid)
                tiles = tiling(axes, text=ctx.text, text_first=ctx.text_first, sinks=self.sinks, device=q.device)
                different = list(dict.fromkeys(windows))
                maps = torch.stack([tile_map(axes, window, q.device) for window in different])
                heads = torch.tensor([different.index(window) for window in windows], device=q.device)
                ctx.static[key] = AttentionPlan.from_block_mask(
                    tiles.complete(maps[heads]),
                    tiles.lengths,
                    tiles.lengths,
                    q_order=tiles.order,
                    kv_order=tiles.order,
                )
        plan: AttentionPlan = ctx.static[key]
        return plan


def _table(name: str, value: Any) -> Any:
    """(t, y, x), [head][3] or [layer][head][3] as nested tuples."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, list | tuple) for item in value):
        return tuple(_table(f"{name}[{i}]", item) for i, item in enumerate(value))
    return _checks.counts(name, value, 3, least=0)


def _nearest(axes: Axes, target: float) -> Widths:
    """Of a chain of nested windows, which grow where they cover least of the axis, the one of nearest density."""
    full = tuple(map(len, axes))
    window: Widths = (1, 1, 1)
    chain = [window]
    while window != full:
        _, axis = min((w / n, i) for i, (w, n) in enumerate(zip(window, full, strict=True)) if w < n)
        grown = list(window)
        grown[axis] = min(grown[axis] + 2, full[axis])
        window = (grown[0], grown[1], grown[2])
        chain.append(window)
    return min(chain, key=lambda w: (abs(density(axes, w) - target), -density(axes, w)))
