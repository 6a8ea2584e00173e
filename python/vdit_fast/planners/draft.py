"""DraftAttention: attention between average-pooled patches decides which patch pairs are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..ops import block_mean, select_top_k
from . import _checks
from ._strips import valid_keys
from ._tokens import Axes, Tiling, cut, tiling
from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class Draft(Planner):
    """DraftAttention (Shen et al., arXiv 2505.14708).

    Video queries and keys are averaged over patches of `pool` tokens of a frame; attention between the averages (the
    draft) estimates the attention weights between patches. Per batch item and head the smallest `sparsity` of all
    draft entries are dropped, over the whole map at once, so that a head may spend its budget where it needs it.
    Tokens are permuted so that a patch is contiguous.

    Different from the paper's code: every query patch keeps at least its strongest key patch; a frame need not be a
    multiple of the pool (patch sides then differ by one token, and the softmax counts every patch with its number of
    keys); text may come first or last; padding is left out of the averages, and patches of padding alone of the map
    that is thresholded (they read themselves); pooling and scores are fp32; scores are compared as logarithms, where
    small probabilities do not collapse into ties at zero; NaN scores are kept, so that NaN inputs give NaN outputs as
    in dense attention.

    Knobs besides those of `Planner`:
        sparsity: fraction of the video-to-video patch pairs to drop, in [0, 1). Text and sinks are kept on top.
        pool: (ph, pw), largest height and width of a patch in tokens.
        pool_t: most frames per patch.
        compensate: read the mean key and value of every dropped patch in place of its tokens (`StandIns`), in the
            manner of SVG-EAR (arXiv 2603.08982). One more key per dropped pair of patches; errors are of second order.

    Raises:
        ValueError, TypeError: a bad knob; in `plan`, a pool larger than the grid (`decide` reports it as a reason for
            dense).
    """

    name: ClassVar[str] = "draft"

    sparsity: float = 0.75
    pool: tuple[int, int] = (8, 16)
    pool_t: int = 1
    compensate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("pool", _checks.counts("pool", self.pool, 2))
        self._set("pool_t", _checks.count("pool_t", self.pool_t, least=1))
        self._set("compensate", _checks.switch("compensate", self.compensate))

    def decide(self, ctx: LayerContext) -> str | None:
        return super().decide(ctx) or self._misfit(ctx)

    def _misfit(self, ctx: LayerContext) -> str | None:
        frames, height, width = ctx.grid
        if self.pool[0] > height or self.pool[1] > width:
            return f"pool {self.pool} is larger than the {height}×{width} token frame"
        return f"pool_t {self.pool_t} is larger than the {frames} frames" if self.pool_t > frames else None

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        self.check_inputs(q, k, ctx)
        if misfit := self._misfit(ctx):
            raise ValueError(f"{misfit}; choose a smaller pool")
        tiles = self._tiling(ctx, q.device)
        scores, real = self._scores(q, k, ctx)
        if ctx.kv_len is None:
            keep = select(scores, self.sparsity)
        else:
            own = torch.eye(scores.shape[-1], dtype=torch.bool, device=q.device)
            keep = torch.where(real[..., None], select(scores, self.sparsity, real.sum(-1).square()), own)
        mask = tiles.complete(keep)
        return AttentionPlan.from_block_mask(
            mask,
            tiles.lengths,
            tiles.lengths,
            q_order=tiles.order,
            kv_order=tiles.order,
            compensate=self.compensate,
        )

    def draft(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """Logarithm of the estimated attention weight of one key token, fp32 [B, H, query patches, key patches].

        Exact when q and k are constant inside every patch (and there is no text): exp of it, times the number of keys
        in the patch, sums to 1 along the last axis. Padding is left out; −inf where a patch has nothing else.
        """
        return self._scores(q, k, ctx)[0]

    def _scores(self, q: Tensor, k: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """The draft, and which patches hold a real token: bool [B, 1, patches]."""
        tiles, valid = self._tiling(ctx, q.device), valid_keys(ctx, q.device)
        lengths, video = tiles.lengths[None, None], tiles.video
        (pooled_q, _), (pooled_k, counts) = (block_mean(x, lengths, tiles.order, valid) for x in (q, k))
        pooled_q, pooled_k, sizes = pooled_q[:, :, video], pooled_k[:, :, video], counts[:, :1, video]
        group = q.shape[2] // k.shape[2]
        if group > 1:
            pooled_k = pooled_k.repeat_interleave(group, 1)
        scores = (pooled_q * q.shape[-1] ** -0.5) @ pooled_k.mT
        scores = scores - torch.logsumexp(scores + sizes.float().log()[:, :, None], -1, keepdim=True)
        real = sizes > 0
        if valid is not None:
            scores = scores.masked_fill(~(real[..., None] & real[:, :, None]), -torch.inf)
        return scores, real

    def axes(self, grid: tuple[int, int, int]) -> Axes:
        """Patch sides along the frame, row and column axis."""
        frames, height, width = grid
        return cut(frames, self.pool_t), cut(height, self.pool[0]), cut(width, self.pool[1])

    def _tiling(self, ctx: LayerContext, device: torch.device) -> Tiling:
        key = ("draft tiles", self, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            ctx.static[key] = tiling(
                self.axes(ctx.grid), text=ctx.text, text_first=ctx.text_first, sinks=self.sinks, device=device
            )
        tiles: Tiling = ctx.static[key]
        return tiles


def select(scores: Tensor, sparsity: float, entries: Tensor | None = None) -> Tensor:
    """Keep the largest entries of each [nq, nk] map, thresholded over the whole map, and the maximum of every row.

    With n = nq·nk and k = int(sparsity · n), everything not below the k-th smallest value stays: n − k + 1 entries
    when all differ (all n when k = 0), plus row maxima. Ties at the threshold stay too, as in the paper: where a head
    cannot tell its patches apart, none is preferred. NaN counts as large, and a row with a NaN stays whole.

    Args:
        scores: fp32 [..., nq, nk].
        sparsity: in [0, 1).
        entries: int64, broadcasts to [...]: n of every map, where its other entries are −inf (padding); None: nq·nk.
    Returns:
        bool, the shape of `scores`.
    """
    flat = scores.flatten(-2)
    if entries is None:
        drop = int(sparsity * flat.shape[-1])
        if drop == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        kept = select_top_k(flat, flat.shape[-1] - drop + 1)
    else:
        drops = (entries.double() * sparsity).long().clamp(min=1)  # none to drop: all n stay
        kept = select_top_k(flat, entries - drops + 1)
    threshold = torch.where(kept, flat.nan_to_num(torch.inf, torch.inf, -torch.inf), torch.inf).amin(-1)
    return ~(scores < torch.minimum(threshold[..., None, None], scores.amax(-1, keepdim=True)))
