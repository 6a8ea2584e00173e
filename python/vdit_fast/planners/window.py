"""Window attention: every head reads either near frames or near places, chosen by a short look at its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._memory import choice
from ._sampling import head_scores, sample
from ._tokens import Axes, Tiling, cut, tile_labels, tiling
from ._windows import Widths, density, tile_map
from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan

KINDS = ("spatial", "temporal")
MAJOR = {"spatial": (0, 1, 2), "temporal": (1, 2, 0)}  # tile order in which that window is one run, or a few


@dataclass(frozen=True, kw_only=True)
class Window(Planner):
    """Spatial and temporal windows per head, in the spirit of Sparse VideoGen (Xi et al., arXiv 2502.01776).

    The video grid is cut into tiles of `tile` tokens (pieces of an axis differ by at most one token). A query tile
    reads the key tiles in a window around it; at the border the window is shifted inward, so that all queries read
    equally many tiles (as in Sliding Tile Attention, arXiv 2502.04507).
      * A *spatial* head reads whole frames: m of the n frame tiles. Density m/n.
      * A *temporal* head reads all frames around its own place: my × mx of the ny × nx places. Density my·mx / (ny·nx).
    m, and my × mx from a chain of nested, nearly square windows, are chosen so that the density comes nearest to 1 −
    sparsity.

    Both kinds share one tiling, so that one plan and one launch serve all heads. Each head orders the tiles by its
    own kind: frame by frame for spatial heads, place by place (all frames of a place in a row) for temporal ones. The
    density is the same in any order, but a window is then one key run (spatial) or one per row of places (temporal)
    instead of up to n·my runs: at 21×45×80 tokens and sparsity 0.75 a temporal tile has 4 runs instead of 44. On a CPU
    that is 1.4 times as fast with 32-token tiles and makes no difference with the default ones.

    Knobs besides those of `Planner`:
        sparsity: fraction of the video-to-video pairs to drop, in [0, 1). Text and sinks are kept on top.
        window_spatial, window_temporal: (frames, rows, columns) in tokens instead of the width derived from
            `sparsity` for that kind; rounded up to whole tiles, 0 = the whole axis.
        tile: (tt, th, tw) in tokens; larger than the grid means the whole axis.
        heads: "auto", "spatial", "temporal", or a tuple with one of the last two words per query head.
            "auto" computes the attention of `rows` query tokens and gives each head (per batch item) the window that
            holds more of its attention mass. That happens at the first sparse step of a generation, per layer and
            guidance branch.
        rows: sampled query tokens of "auto".
        refresh: look again every `refresh` steps; 0 = only once per generation (also while the step is unknown).

    Raises:
        ValueError, TypeError: a bad knob; in `plan`, `heads` of another length than the model's heads.
    """

    name: ClassVar[str] = "window"

    sparsity: float = 0.75
    window_spatial: Widths | None = None
    window_temporal: Widths | None = None
    tile: Widths = (2, 8, 8)
    heads: str | tuple[str, ...] = "auto"
    rows: int = 64
    refresh: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        for knob in ("window_spatial", "window_temporal"):
            if getattr(self, knob) is not None:
                self._set(knob, _checks.counts(knob, getattr(self, knob), 3, least=0))
        self._set("tile", _checks.counts("tile", self.tile, 3))
        if isinstance(self.heads, list | tuple):
            self._set("heads", tuple(_checks.choice(f"heads[{i}]", word, KINDS) for i, word in enumerate(self.heads)))
            if not self.heads:
                raise ValueError('heads is empty; give one word per head, or "auto", "spatial" or "temporal"')
        else:
            _checks.choice("heads", self.heads, ("auto", *KINDS))
        self._set("rows", _checks.count("rows", self.rows, least=1))
        self._set("refresh", _checks.count("refresh", self.refresh))

    # ------------------------------------------------------------------ geometry
    def axes(self, grid: tuple[int, int, int]) -> Axes:
        """Piece lengths of the frame, row and column axis."""
        frames, height, width = (cut(n, size) for n, size in zip(grid, self.tile, strict=True))
        return frames, height, width

    def widths(self, grid: tuple[int, int, int]) -> dict[str, Widths]:
        """The window of each kind in tiles along (frames, rows, columns), as used for this grid."""
        axes = self.axes(grid)
        full = tuple(map(len, axes))
        found = {}
        for kind, given in (("spatial", self.window_spatial), ("temporal", self.window_temporal)):
            if given is not None:
                t, y, x = (min(math.ceil(w / s), n) if w else n for w, s, n in zip(given, self.tile, full, strict=True))
                found[kind] = (t, y, x)
                continue
            if kind == "spatial":
                options = [(m, full[1], full[2]) for m in range(1, full[0] + 1)]
            else:
                options = [(full[0], my, mx) for my, mx in _growing(axes[1], axes[2])]
            target = 1 - self.sparsity
            found[kind] = min(options, key=lambda w: (abs(density(axes, w) - target), -density(axes, w)))
        return found

    @property
    def remembers(self) -> bool:
        return self.heads == "auto" and self.refresh != 1

    # ------------------------------------------------------------------ plan
    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        self.check_inputs(q, k, ctx)
        if self.heads == "auto":
            return self._build(self._chosen(q, k, ctx), ctx, q.device)
        words = self.heads if isinstance(self.heads, tuple) else (self.heads,)
        if isinstance(self.heads, tuple):
            count = ctx.all_heads(q.shape[2])
            if len(words) != count:
                raise ValueError(f"heads lists {len(words)} heads but q has {count}; give one word per head")
            words = tuple(ctx.own_heads(words))
        key = ("window plan", self, words, tuple(ctx.grid), ctx.text, ctx.text_first, q.device)
        if key not in ctx.static:
            with torch.inference_mode(False):
                temporal = torch.tensor([[word == "temporal" for word in words]], device=q.device)
                ctx.static[key] = self._build(temporal, ctx, q.device)
        plan: AttentionPlan = ctx.static[key]
        return plan

    def _build(self, temporal: Tensor, ctx: LayerContext, device: torch.device) -> AttentionPlan:
        """The plan of bool [1|B, 1|H], True where the head is temporal."""
        from ..plan import AttentionPlan

        (space, space_map), (time, time_map) = (self._kind(kind, ctx, device) for kind in KINDS)
        one, two = temporal[..., None], temporal[..., None, None]
        order = torch.where(one, time.order, space.order)
        sizes = torch.where(one, time.lengths, space.lengths)
        return AttentionPlan.from_clusters(torch.where(two, time_map, space_map), sizes, sizes, order, order)

    def _kind(self, kind: str, ctx: LayerContext, device: torch.device) -> tuple[Tiling, Tensor]:
        """Tiles in the order of this kind, and its map bool [blocks, blocks]."""
        key = ("window tiles", self, kind, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            axes, major = self.axes(ctx.grid), MAJOR[kind]
            with torch.inference_mode(False):
                tiles = tiling(
                    axes, major=major, text=ctx.text, text_first=ctx.text_first, sinks=self.sinks, device=device
                )
                keep = tile_map(axes, self.widths(ctx.grid)[kind], device, major)
                ctx.static[key] = (tiles, tiles.complete(keep))
        found: tuple[Tiling, Tensor] = ctx.static[key]
        return found

    # ------------------------------------------------------------------ choice of heads
    def _chosen(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """bool [B, H] of this layer and branch, True = temporal; from the state, or measured now."""

        def choose() -> Tensor:
            mass = self.masses(q, k, ctx)
            return mass[..., 1] > mass[..., 0]

        return choice("window heads", self, q, ctx, self.refresh, choose)

    @torch.no_grad()
    def masses(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """Attention mass inside the spatial and the temporal window, mean of the sampled rows: fp32 [B, H, 2].

        Padding (`ctx.kv_len`) neither gives nor gets mass; text keys, read by everyone, count for neither window.
        """
        picked = sample(self.rows, ctx.n_video, q.device)
        inside = self._inside(picked, ctx, q.device)  # [rows, n_video, 2]
        first = ctx.text if ctx.text_first else 0
        real = None
        if ctx.kv_len is not None:
            real = (picked + first < ctx.kv_len.to(q.device)[:, None]).mT[..., None, None]  # [rows, B, 1, 1]
        found = []
        for _, scores in head_scores(q.index_select(1, picked + first), k, ctx.kv_len):
            mass = torch.softmax(scores, -1).narrow(-1, first, ctx.n_video)  # [B, group, rows, n_video]
            held = (mass.flatten(0, 1).transpose(0, 1) @ inside).unflatten(1, mass.shape[:2])  # [rows, B, group, 2]
            if real is None:
                found.append(held.mean(0))
            else:
                found.append(held.where(real, 0).sum(0) / real.sum(0).clamp(min=1))
        return torch.cat(found, 1)

    def _inside(self, picked: Tensor, ctx: LayerContext, device: torch.device) -> Tensor:
        """fp32 [rows, n_video, 2]: 1 where a sampled query reads the video key by the spatial / temporal window."""
        axes, widths = self.axes(ctx.grid), self.widths(ctx.grid)
        tile = tile_labels(axes, device=device)
        maps = torch.stack([tile_map(axes, widths[kind], device) for kind in KINDS], -1)
        inside = maps[tile[picked]][:, tile]
        if self.sinks:
            inside[:, : self.sinks * ctx.grid[1] * ctx.grid[2]] = True
        return inside.float()


def _growing(rows: tuple[int, ...], columns: tuple[int, ...]) -> list[tuple[int, int]]:
    """Nested windows in tiles from (1, 1) to everything, growing the side that has fewer tokens."""
    my = mx = 1
    chain = [(my, mx)]
    while (my, mx) != (len(rows), len(columns)):
        taller = mx == len(columns) or (my < len(rows) and my * rows[0] <= mx * columns[0])
        my, mx = (my + 1, mx) if taller else (my, mx + 1)
        chain.append((my, mx))
    return chain
