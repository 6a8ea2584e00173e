"""SpargeAttn: attention between mean-pooled blocks selects, except where a block's mean says little about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import ops
from . import _checks
from ._strips import equal, strips, valid_keys
from ._tokens import Tiling
from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan


TRANSIENT = 64 << 20
"""Bytes of tokens that are normalised at a time, in fp32; at least one head."""


@dataclass(frozen=True, kw_only=True)
class Sparge(Planner):
    """SpargeAttn (Zhang et al., arXiv 2502.18137): its selection of blocks, without its INT8 arithmetic.

    Queries and keys are averaged over blocks of consecutive tokens. A block's self-similarity is the mean of the
    cosines between all its tokens, for keys after the mean key was subtracted from all of them (which changes no
    attention weight, and so no score). Below `similarity` a block's mean stands for nothing, and the block is *fixed*:
    a fixed query block reads everything, a fixed key block is read by everything and takes no part in the softmax. Of
    the other key blocks a query block reads those of the largest estimated attention mass.

    Different from the authors' code: the softmax counts a block with its number of keys, which matters for the shorter
    last one; with `top_p`, theirs reads the blocks whose sorted mass adds up to at most that, ours also the one at
    which it exceeds it, so that the share is held; self-similarity is fp32; any length; text may come first or last and
    is read by everything. The second filter inside their kernel, which skips products with V, is not part of a plan.

    Knobs besides those of `Planner`:
        sparsity: fraction of the video's key blocks that a query block does not read, in [0, 1). Text, sinks and fixed
            blocks are kept on top. Without effect when `top_p` is given.
        top_p: read the fewest blocks that hold this share of the estimated mass on the video instead, in [0, 1].
        similarity: least self-similarity of a block, in [0, 1); 0: none is fixed, as in the authors' recommended call.
        block: (query, key) tokens per block.

    Raises:
        ValueError, TypeError: a bad knob.
    """

    name: ClassVar[str] = "sparge"

    sparsity: float = 0.5
    top_p: float | None = None
    similarity: float = 0.0
    block: tuple[int, int] = (128, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        if self.top_p is not None:
            self._set("top_p", _checks.number("top_p", self.top_p, least=0, most=1))
        self._set("similarity", _checks.fraction("similarity", self.similarity))
        self._set("block", _checks.counts("block", self.block, 2))

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        self.check_inputs(q, k, ctx)
        rows, columns = self._strips(ctx, q.device)
        mask = torch.ones(q.shape[0], q.shape[2], rows.blocks, columns.blocks, dtype=torch.bool, device=q.device)
        mask[..., rows.video, columns.video] = self.select(q, k, ctx) | columns.sink[columns.video]
        return AttentionPlan.from_block_mask(mask, rows.lengths, columns.lengths, lq=ctx.num_tokens, lk=ctx.num_tokens)

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """Which video key blocks each video query block reads: bool [B, H, query blocks, key blocks]."""
        rows, columns = self._strips(ctx, q.device)
        group = q.shape[2] // k.shape[2]
        valid = valid_keys(ctx, q.device)
        mean_q, queries = self._means(q, rows, valid)
        mean_k, count = self._means(k, columns, valid)
        log_count = count.log().repeat_interleave(group, 1)[:, :, None]  # −inf: only padding
        scores = (mean_q * q.shape[-1] ** -0.5) @ mean_k.repeat_interleave(group, 1).mT + log_count
        if self.similarity == 0:
            return self._largest(scores)
        weight = count / count.sum(-1, keepdim=True).clamp(min=1)
        centre = (weight[..., None] * mean_k).sum(2, keepdim=True)  # the mean key, [B, Hkv, 1, D]
        # a block of padding alone has no tokens that could differ
        fixed_q = (self._similarity(q, rows, ctx) < self.similarity) & (queries > 0)
        fixed_k = (self._similarity(k, columns, ctx, centre) < self.similarity) & (count > 0)
        fixed_k = fixed_k.repeat_interleave(group, 1)[:, :, None]
        return self._largest(scores.masked_fill(fixed_k, -math.inf)) | fixed_k | fixed_q[..., None]

    def _largest(self, scores: Tensor) -> Tensor:
        if self.top_p is not None:
            return ops.select_top_p(torch.softmax(scores, -1), self.top_p)
        return ops.select_top_k(scores, max(1, int((1 - self.sparsity) * scores.shape[-1] + 1e-9)))

    def _similarity(self, x: Tensor, blocks: Tiling, ctx: LayerContext, centre: Tensor | None = None) -> Tensor:
        """Mean cosine of all pairs of tokens of each video block, after `centre` [B, H, 1, D]: fp32 [B, H, blocks].

        Σ_ij x̂_i · x̂_j / n² is the squared length of the mean of the unit vectors x̂.
        """
        valid, (batch, tokens, heads, dim) = valid_keys(ctx, x.device), x.shape
        step = max(1, TRANSIENT // (4 * tokens * dim))  # all heads at once would take gigabytes
        found = []
        for item in range(batch):
            own = slice(item, item + 1)
            length = None if valid is None else valid[own]
            for part in (slice(first, first + step) for first in range(0, heads, step)):
                unit = x[own, :, part].to(torch.float32, copy=True)
                if centre is not None:
                    unit -= centre[own, part].transpose(1, 2)
                unit /= torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_(min=1e-12)
                found.append(self._means(unit, blocks, length)[0].square().sum(-1))
        return torch.cat(found, 1).view(batch, heads, -1)

    def _means(self, x: Tensor, blocks: Tiling, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Means and counts of the valid tokens of the video blocks, fp32 [B, H, blocks, D] and [B, H, blocks]."""
        means, count = ops.block_mean(x, blocks.lengths[None, None], None, valid)
        return means[:, :, blocks.video], count[:, :, blocks.video].float()

    def _strips(self, ctx: LayerContext, device: torch.device) -> tuple[Tiling, Tiling]:
        """Query and key blocks."""
        key = ("sparge strips", self, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            rows, columns = (strips(equal(ctx.n_video, size), ctx, self.sinks, device) for size in self.block)
            ctx.static[key] = rows, columns
        found: tuple[Tiling, Tiling] = ctx.static[key]
        return found
