"""Video sparse attention: every cube of tokens reads the cubes whose mean keys fit its mean query best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import ops
from . import _checks
from ._strips import valid_keys
from ._tokens import Tiling, cut, tiling
from .base import Decision, Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class VSA(Planner):
    """VSA, Video Sparse Attention (Zhang et al., arXiv 2505.13389).

    Queries, keys and values are averaged over cubes of the grid. Attention between the averages, the coarse branch,
    gives a score for every pair of cubes; a query cube reads the k key cubes with the highest scores (the fine
    branch), k = ⌈(1 − sparsity) · cubes⌉. The output is fine + gate · coarse, each coarse row spread over its cube.
    As in the authors' code, the coarse softmax counts every cube once, however many tokens it has.

    Different from the authors' code: `gate` is a number, theirs a trained linear layer per token and channel; cubes of
    a ragged grid differ by at most one token per side instead of being padded; text may come first or last, is read by
    every cube and gets no coarse part.

    Knobs besides those of `Planner`:
        sparsity: fraction of the video's key cubes that a query cube does not read, in [0, 1). Text and sinks are kept
            on top.
        cube: (tt, th, tw) in tokens; larger than the grid means the whole axis.
        gate: factor of the coarse branch. 0 is right for models that were not trained with it. No gradient flows
            through the coarse branch.

    Raises:
        ValueError, TypeError: a bad knob.
    """

    name: ClassVar[str] = "vsa"

    sparsity: float = 0.75
    cube: tuple[int, int, int] = (4, 4, 4)
    gate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("cube", _checks.counts("cube", self.cube, 3))
        self._set("gate", _checks.number("gate", self.gate))

    @torch.no_grad()
    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        reason = self.decide(ctx)
        if reason is not None:
            return Decision(reason=reason)
        scores = self.scores(q, k, ctx)
        residual = None if self.gate == 0 else self.coarse(scores, v, ctx)
        return Decision(self._select(scores, ctx), residual=residual)

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        return self._select(self.scores(q, k, ctx), ctx)

    def scores(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """Scaled products of mean queries and keys, fp32 [B, H, cubes, cubes]; −inf for cubes of padding keys."""
        self.check_inputs(q, k, ctx)
        tiles = self._tiling(ctx, q.device)
        group = q.shape[2] // k.shape[2]
        (mean_q, _), (mean_k, count) = (self._means(x, ctx) for x in (q, k))
        mean_k, count = mean_k.repeat_interleave(group, 1), count.repeat_interleave(group, 1)
        scores = (mean_q[:, :, tiles.video] * q.shape[-1] ** -0.5) @ mean_k[:, :, tiles.video].mT
        return scores.masked_fill((count[:, :, tiles.video] == 0)[:, :, None], -math.inf)

    def coarse(self, scores: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """gate · softmax(scores) · mean values, spread over the tokens of each cube: [B, N, H, D], 0 for text."""
        tiles = self._tiling(ctx, v.device)
        mean_v = self._means(v, ctx)[0].repeat_interleave(scores.shape[1] // v.shape[2], 1)
        out = torch.zeros_like(mean_v)
        out[:, :, tiles.video] = self.gate * (torch.softmax(scores, -1) @ mean_v[:, :, tiles.video])
        block = torch.arange(tiles.blocks, device=v.device)
        place = torch.repeat_interleave(block, tiles.lengths, output_size=ctx.num_tokens)
        token = torch.empty_like(place).scatter_(0, tiles.order.flatten().long(), place)  # the block of every token
        return out.to(v.dtype).transpose(1, 2).index_select(1, token)

    def _select(self, scores: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        tiles = self._tiling(ctx, scores.device)
        cubes = scores.shape[-1]
        # 1e-9: (1 - 0.7) · 10 is 3.0000000000000004 in binary
        kept = max(1, math.ceil((1 - self.sparsity) * cubes - 1e-9))
        mask = tiles.complete(ops.select_top_k(scores, kept))
        return AttentionPlan.from_block_mask(
            mask, tiles.lengths, tiles.lengths, q_order=tiles.order, kv_order=tiles.order
        )

    def _means(self, x: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        tiles = self._tiling(ctx, x.device)
        return ops.block_mean(x, tiles.lengths[None, None], tiles.order, valid_keys(ctx, x.device))

    def _tiling(self, ctx: LayerContext, device: torch.device) -> Tiling:
        key = ("vsa tiles", self, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            frames, height, width = (cut(n, size) for n, size in zip(ctx.grid, self.cube, strict=True))
            ctx.static[key] = tiling(
                (frames, height, width), text=ctx.text, text_first=ctx.text_first, sinks=self.sinks, device=device
            )
        tiles: Tiling = ctx.static[key]
        return tiles
