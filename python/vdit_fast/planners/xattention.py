"""XAttention: sums along antidiagonals of the score matrix estimate the attention mass of every block."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class XAttention(Planner):
    """XAttention (Xu et al., arXiv 2503.16428), without a causal mask.

    With `stride` = s, every s × s patch of QKᵀ is represented by the sum along its antidiagonal, so that each query and
    each key takes part in one of s products. A softmax over those sums, scaled by 1 / (s √D), gives every block of
    `block` × `block` tokens an estimated mass, at 1/s of the cost of QKᵀ. A block row reads the blocks of the largest
    mass, up to and including the one that brings their sum above `top_p` of the row's.

    Different from the authors' code: theirs stops when the sum reaches `top_p`, ours when it exceeds it, which differs
    only when they are equal; text may come first or last, is read by everything and left out of the estimate, as is
    padding; any length.

    Knobs besides those of `Planner`:
        top_p: share of the estimated mass on the video that is read, in [0, 1]; 1 is dense. The density grows with it.
        stride: distance of the antidiagonals; 1 computes the exact masses.
        block: tokens per block, a multiple of `stride`.

    Raises:
        ValueError, TypeError: a bad knob.
    """

    name: ClassVar[str] = "xattention"

    top_p: float = 0.9
    stride: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("top_p", _checks.number("top_p", self.top_p, least=0, most=1))
        self._set("stride", _checks.count("stride", self.stride, least=1))
        self._set("block", _checks.count("block", self.block, least=1))
        if self.block % self.stride:
            raise ValueError(f"block {self.block} is not a multiple of stride {self.stride}; choose one that is")

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        self.check_inputs(q, k, ctx)
        blocks = self._strips(ctx, q.device)
        mask = blocks.complete(ops.select_top_p(self.mass(q, k, ctx), self.top_p))
        return AttentionPlan.from_block_mask(mask, blocks.lengths, blocks.lengths, lq=ctx.num_tokens, lk=ctx.num_tokens)

    def mass(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """Estimated attention mass between video blocks, mean over the query rows: fp32 [B, H, blocks, blocks].

        Rows of full blocks sum to 1. Exact with stride 1. Padding queries count for nothing; a block of padding alone
        holds its own mass.
        """
        video = ctx.video_slice
        q, k = q[:, video], k[:, video]
        valid = valid_keys(ctx, q.device)
        if valid is not None:
            valid = (valid - video.start).clamp(0, ctx.n_video)
        rows = self.block // self.stride
        mass = ops.softmax_mass(q, k, rows, rows, fold=self.stride, q_len=valid, kv_len=valid) / rows
        if valid is None:
            return mass
        blocks = torch.arange(mass.shape[-1], device=q.device)
        empty = (blocks * self.block >= valid[:, None])[:, None, :, None]
        return torch.where(empty, (blocks[:, None] == blocks).float(), mass)

    def _strips(self, ctx: LayerContext, device: torch.device) -> Tiling:
        key = ("xattention strips", self, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            ctx.static[key] = strips(equal(ctx.n_video, self.block), ctx, self.sinks, device)
        found: Tiling = ctx.static[key]
        return found
