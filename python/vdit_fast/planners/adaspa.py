"""AdaSpa: a few searches per generation find the heaviest key blocks; the steps between read the blocks found."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..plan.bits import pack_columns, unpack_rows
from . import _checks
from ._memory import slot
from ._strips import equal, strips
from ._tokens import Tiling
from .base import SIGMA_SLACK, Decision, Planner

if TYPE_CHECKING:
    from ..context import LayerContext, StepContext
    from ..plan import AttentionPlan

RECALL = 0.8
"""Heads whose kept blocks hold more than this share of their attention mass can do with fewer of them."""


@dataclass(frozen=True, eq=False)
class _Found:
    """What one layer remembers. `same` says for which inputs; `lse` is kept while a later search may use it."""

    same: Hashable
    searches: int
    lists: Tensor
    lse: Tensor | None


@dataclass(frozen=True, kw_only=True)
class AdaSpa(Planner):
    """AdaSpa (arXiv 2502.21079).

    A *search* adds up the attention weights between blocks of `block` tokens, W[P, Q] = Σ exp(q_i·k_j / √D − lse_i)
    over i in P, j in Q, and keeps the k = round((1 − sparsity) · n) key blocks with the largest W in every block row,
    n being the number of video blocks. The calls between two searches read the kept blocks.
      * The first search is a dense call that leaves its log-sum-exp; W needs one more pass over QK^T, and no values.
      * Later ones use that log-sum-exp although q and k have moved on: it only weighs rows of one block against each
        other. The call they happen in is sparse already, with the new blocks.
      * Head-adaptive budgets: with R_h the share of W that head h keeps and c = #{R_h > 0.8}, at most H/2, the c heads
        of largest R_h keep ⌈k/2⌉ blocks per row, the c of smallest R_h keep ⌊3k/2⌋: sparsities (1 + s)/2 and
        (3s − 1)/2 with the same sum.

    Blocks are consecutive video tokens in the model's own order; the last may be shorter. Text is cut apart, reads
    everything and is read by everything, as are the sinks, on top of the budget. W, recall and ranks leave padding
    out (`kv_len`), and every batch item and head has its own blocks.

    A search that a feature cache or a partial range skipped happens at the next call. A generation whose first search
    is late is dense until then, with that reason.

    Memory per layer, guidance branch and frame block: the kept blocks as bits, B·H·n·⌈n/32⌉·4 bytes, and until the
    last search the log-sum-exp, B·H·n_video·4 bytes: 7.0 MB and 12.1 MB for Wan 14B at 720 × 1280 with 81 frames. A
    search needs W besides, B·H·n²·4 bytes (224 MB).

    Knobs besides those of `Planner` (whose `dense_steps` is 0.2 here: 10 of the paper's 50):
        sparsity: fraction of the video-to-video block pairs to drop, in [0, 1). Text and sinks are kept on top.
        block: tokens per block of queries and of keys.
        search: increasing step ids (ints), or fractions of the schedule (floats): the paper's steps 10 and 30 of 50.
            Where the number of steps is unknown, a fraction is reached when 1 − sigma reaches it.
        head_adaptive: whether budgets follow the heads' recall; needs sparsity ≥ 1/3.

    Raises:
        ValueError, TypeError: a bad knob; in `decide`, a search step beyond the schedule.
    """

    name: ClassVar[str] = "adaspa"

    dense_steps: int | float = 0.2
    sparsity: float = 0.8
    block: int = 64
    search: tuple[int | float, ...] = (0.2, 0.6)
    head_adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("block", _checks.count("block", self.block, least=1))
        self._set("search", _checks.schedule("search", self.search))
        _checks.switch("head_adaptive", self.head_adaptive)
        if self.head_adaptive and self.sparsity < 1 / 3:
            raise ValueError(
                f"sparsity {self.sparsity:g} is below 1/3, where head_adaptive would give a head more than all blocks "
                "(sparsity (3s − 1)/2 < 0); raise sparsity or set head_adaptive to false"
            )

    # ------------------------------------------------------------------ when
    def decide(self, ctx: LayerContext) -> str | None:
        due = self._due(ctx.step)
        if reason := super().decide(ctx):
            return reason
        if due is None:
            return f"search {self.search} is set but the denoising step is unknown"
        return None if due else f"step {ctx.step.step} is before the first search ({self.search[0]:g})"

    def _due(self, step: StepContext) -> int | None:
        """How many searches the schedule has reached; None when that cannot be known."""
        ids, total = isinstance(self.search[0], int), step.num_steps
        if ids and total is not None and self.search[-1] >= total:
            raise ValueError(
                f"search step {self.search[-1]} is beyond the schedule of {total} steps; give step ids below {total}, "
                "or fractions of the schedule"
            )
        if step.step >= 0 and (ids or total is not None):
            # 1e-9: 0.29 · 100 is 28.999999999999996 in binary
            first = self.search if ids else [math.floor(part * (total or 0) + 1e-9) for part in self.search]
            return sum(step.step >= at for at in first)
        if step.sigma is not None and not ids:
            return sum(1.0 - step.sigma >= part - SIGMA_SLACK for part in self.search)
        return None

    def observes(self, step: StepContext) -> str | None:
        return "adaspa searches in this step" if step.step >= 0 and step.step in self._searches(step) else None

    def _searches(self, step: StepContext) -> set[int]:
        """The steps in which searches happen where every step is computed; none where fractions have no schedule."""
        total, dense = step.num_steps, self.dense_steps
        if total is None and (isinstance(dense, float) or isinstance(self.search[0], float)):
            return set()
        places = [part if isinstance(part, int) else math.floor(part * (total or 0) + 1e-9) for part in self.search]
        first = dense if isinstance(dense, int) else math.floor(dense * (total or 0) + 1e-9)
        return {max(place, first) for place in places}

    @property
    def remembers(self) -> bool:
        return True

    # ------------------------------------------------------------------ one call
    @torch.no_grad()
    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        reason = self.decide(ctx)
        if reason is not None:
            return Decision(reason=reason)
        self.check_inputs(q, k, ctx)
        step, due = ctx.step, self._due(ctx.step) or 0
        key = slot("adaspa", self, ctx)
        same = (step.generation, tuple(ctx.grid), ctx.text, ctx.text_first, *q.shape, k.shape[2], q.device)

        def search(lse: Tensor) -> _Found:
            keep = self.select(self.mass(q, k, lse, ctx), ctx)
            later = due < len(self.search)
            ctx.state[key] = found = _Found(same, due, _pack(keep), lse.clone() if later else None)
            return found

        @torch.no_grad()
        def observe(_: Tensor, lse: Tensor) -> None:
            search(lse[:, :, ctx.video_slice])

        found: _Found | None = ctx.state.get(key)
        if found is None or found.same != same:
            ctx.state.pop(key, None)
            return Decision(reason=f"step {step.step} searches with its dense attention", observe=observe)
        if found.searches < due and found.lse is not None:
            found = search(found.lse)
        return Decision(self._plan(_unpack(found.lists), ctx))

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        """The plan that a search with these q and k finds; remembers nothing and ignores the schedule."""
        self.check_inputs(q, k, ctx)
        lse = ops.score_lse(q, k, kv_len=ctx.kv_len)
        return self._plan(self.select(self.mass(q, k, lse[:, :, ctx.video_slice], ctx), ctx), ctx)

    def _plan(self, keep: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        blocks, tokens = self._blocks(ctx, keep.device), ctx.num_tokens
        return AttentionPlan.from_block_mask(
            blocks.complete(keep), blocks.lengths, blocks.lengths, lq=tokens, lk=tokens
        )

    def _blocks(self, ctx: LayerContext, device: torch.device) -> Tiling:
        key = ("adaspa blocks", self, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            ctx.static[key] = strips(equal(ctx.n_video, self.block), ctx, self.sinks, device)
        blocks: Tiling = ctx.static[key]
        return blocks

    # ------------------------------------------------------------------ search
    def mass(self, q: Tensor, k: Tensor, lse: Tensor, ctx: LayerContext) -> Tensor:
        """W between video blocks, fp32 [B, H, n, n].

        Args:
            q, k: as in `plan`.
            lse: fp32 [B, H, n_video], log-sum-exp of every video query over the whole joint sequence. When it is exact
                and there is no text, a row of W sums to its number of query tokens; with text, to their attention mass
                on the video.
        """
        kv_len = ctx.kv_len
        if kv_len is not None:
            kv_len = (kv_len - ctx.video_slice.start).clamp(0, ctx.n_video)
            # a padding query must not have a say in what the real ones of its block read
            padding = torch.arange(ctx.n_video, device=q.device) >= kv_len[:, None, None]
            lse = lse.masked_fill(padding, -math.inf)
        video_q, video_k = (x[:, ctx.video_slice] for x in (q, k))
        return ops.block_mass(video_q, video_k, lse.contiguous(), self.block, self.block, kv_len=kv_len)

    def select(self, mass: Tensor, ctx: LayerContext) -> Tensor:
        """The blocks that W [B, H, n, n] keeps, bool of its shape, without sinks and text."""
        kept = kept_blocks(self.sparsity, mass.shape[-1])
        keep = ops.select_top_k(mass, kept)
        if not self.head_adaptive:
            return keep
        blocks = self._blocks(ctx, mass.device)
        read = mass.masked_fill(~(keep | blocks.sink[blocks.video]), 0.0)
        recall = read.sum((-2, -1)) / mass.sum((-2, -1))
        if ctx.heads is None:
            wanted = budgets(recall, kept)
        else:  # heads are compared with all others of the layer
            wanted = budgets(ctx.heads.gather(recall), kept).narrow(1, ctx.heads.first, ctx.heads.count)
        return ops.select_top_k(mass, wanted[..., None])


def kept_blocks(sparsity: float, blocks: int) -> int:
    """Key blocks per row: (1 − sparsity) · blocks rounded, half up, and at least 1."""
    return max(1, math.floor((1 - sparsity) * blocks + 0.5 + 1e-9))


def budgets(recall: Tensor, kept: int) -> Tensor:
    """Blocks per row of every head, int64 [B, H], from recall fp32 [B, H] and the mean number `kept`.

    Among c heads of most and c of least recall, ⌈kept/2⌉ + ⌊3·kept/2⌋ = 2·kept: the mean does not move. Ties go to the
    lower head; NaN (a head without mass) counts as no recall.
    """
    heads = recall.shape[-1]
    recall = recall.nan_to_num(0.0)
    easy = (recall > RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    shift = (rank >= heads - easy).long() - (rank < easy).long()
    return kept + shift * (kept // 2)


def _pack(keep: Tensor) -> Tensor:
    """bool [B, H, n, n] → its bits, int32 [B, H, n, ⌈n/32⌉]."""
    batch, heads, rows, columns = keep.shape
    return pack_columns(keep.flatten(0, 1), [columns]).view(batch, heads, rows, -1)


def _unpack(lists: Tensor) -> Tensor:
    """The bool map that was packed."""
    batch, heads, blocks = lists.shape[:3]
    return unpack_rows(lists.flatten(0, 2), blocks).view(batch, heads, blocks, blocks)
