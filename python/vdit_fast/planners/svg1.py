"""Sparse VideoGen: every head reads a band along the frames or along the places, whichever loses less of its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._memory import choice
from ._sampling import head_scores, sample
from ._tokens import cut
from ._windows import band_width
from .base import Decision, Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan

KINDS = ("spatial", "temporal")
MODELS: dict[str, dict[str, Any]] = {
    "wan-t2v-14b-720p": {"sparsity": 0.7, "rows": 64, "dense_steps": 0.2, "dense_layers": 1},
    "wan-i2v-14b-720p": {"sparsity": 0.7, "rows": 64, "dense_steps": 0.35, "dense_layers": 1},
    "hunyuan-video-720p": {"sparsity": 0.75, "dense_steps": 0.1, "dense_layers": 1, "sinks": 0},
    "cogvideox-1.5-5b": {"sparsity": 0.75, "rows": 32, "dense_steps": 0.2, "dense_layers": 1, "sinks": 0},
}
"""Settings of the scripts published with the paper."""


@dataclass(frozen=True, eq=False)
class Band:
    """The joint sequence in the order of one kind, its blocks, and the block map.

    q_order, kv_order: int32 [1, 1, N].            q_lengths, kv_lengths: int64 [1, 1, blocks].
    q_block, kv_block: int64 [N], the block of every original token.
    keep: bool [query blocks, key blocks].
    """

    q_order: Tensor
    kv_order: Tensor
    q_lengths: Tensor
    kv_lengths: Tensor
    q_block: Tensor
    kv_block: Tensor
    keep: Tensor


@dataclass(frozen=True, kw_only=True)
class SVG1(Planner):
    """Sparse VideoGen (Xi et al., arXiv 2502.01776).

    A head is *spatial* (it reads near frames) or *temporal* (it reads its own place in all frames). Both read a band
    |i − j| ≤ w around the diagonal: the positions i, j of a spatial head count frame by frame, those of a temporal
    head place by place, all frames of a place in a row. Every head sorts its tokens in the order of its kind, so that
    one plan, whose rows have one run of keys each besides text and sinks, serves all heads.

    The band of w = W · fs tokens (fs: tokens per frame) keeps 1 − sparsity of all pairs, text included:
        W  =  (N / fs) · (1 − √(1 − s')),      s'  =  1 − sparsity − 2 · text / N.
    It is cut at whole blocks of at most `block` tokens: a query block reads the key blocks whose centres are at most w
    away, and those that overlap it in any case, so that every token reads itself.

    The kind of a head, per batch item, is the one with the smaller squared error of the outputs of `rows` query
    tokens, spread over the video by the golden ratio; padding rows do not count.

    Different from the paper's code: rows are spread instead of drawn at random among the first 10,000; the errors are
    those of the bands that will run instead of fixed narrower ones; blocks need not divide a frame; sink frames are
    whole frames for temporal heads, too.

    Knobs besides those of `Planner`:
        sparsity: fraction of all pairs, text included, to drop, in [0, 1); 0 keeps everything. Sinks are kept on top,
            and so is text where it takes more than 1 − sparsity.
        rows: sampled query tokens.
        refresh: choose again every `refresh` steps; 1 = in every sparse call, 0 = once per generation.
        block: most tokens per block.
        sinks: frames that every query reads, here 1 by default, as published for Wan.

    Raises:
        ValueError, TypeError: a bad knob; `plan`, which has no values to take an error of: call `decision`.
    """

    name: ClassVar[str] = "svg1"

    sparsity: float = 0.75
    rows: int = 64
    refresh: int = 1
    block: int = 128
    sinks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("rows", _checks.count("rows", self.rows, least=1))
        self._set("refresh", _checks.count("refresh", self.refresh))
        self._set("block", _checks.count("block", self.block, least=1))

    @classmethod
    def for_model(cls, model: str, **knobs: Any) -> SVG1:
        """The settings of the authors' script for `model` (a key of `MODELS`), with `knobs` in place of some of them.

        Raises:
            ValueError: no script is known for the model.
        """
        if model not in MODELS:
            raise ValueError(f"no published settings for {model!r}; known: {', '.join(MODELS)}")
        return cls(**{**MODELS[model], **knobs})

    def width(self, ctx: LayerContext) -> float:
        """W, half the width of the band in frames; all tokens where everything is kept."""
        return band_width(self.sparsity, ctx) / (ctx.grid[1] * ctx.grid[2])

    @property
    def remembers(self) -> bool:
        return self.refresh != 1

    # ------------------------------------------------------------------ plan
    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        reason = self.decide(ctx)
        if reason is not None:
            return Decision(reason=reason)
        self.check_inputs(q, k, ctx)

        def choose() -> Tensor:
            error = self.errors(q, k, v, ctx).nan_to_num(math.inf, math.inf)
            return error[..., 1] < error[..., 0]

        with torch.no_grad():
            return Decision(self._build(choice("svg1 heads", self, q, ctx, self.refresh, choose), ctx))

    def _build(self, temporal: Tensor, ctx: LayerContext) -> AttentionPlan:
        """The plan of bool [1|B, 1|H], True where the head is temporal."""
        from ..plan import AttentionPlan

        space, time = (self.band(kind, ctx, temporal.device) for kind in KINDS)
        one = temporal[..., None]
        q_order, kv_order, keep = (
            torch.where(one, time.q_order, space.q_order),
            torch.where(one, time.kv_order, space.kv_order),
            torch.where(one[..., None], time.keep, space.keep),
        )
        return AttentionPlan.from_clusters(keep, space.q_lengths, space.kv_lengths, q_order, kv_order)

    @torch.no_grad()
    def errors(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """Squared error of the sampled rows' outputs with the spatial and the temporal band: fp32 [B, H, 2].

        Mean over the rows and dimensions; padding rows count as 0, padding keys and values are not read.
        """
        picked = sample(self.rows, ctx.n_video, q.device) + (ctx.text if ctx.text_first else 0)
        bands = [self.band(kind, ctx, q.device) for kind in KINDS]
        outside = torch.stack([~band.keep[band.q_block[picked]][:, band.kv_block] for band in bands])
        real = None
        if ctx.kv_len is not None:
            length = ctx.kv_len.to(q.device).view(-1, 1)
            real = (picked < length)[:, None, :, None]
            v = v.masked_fill((torch.arange(v.shape[1], device=v.device) >= length)[..., None, None], 0)
        found = []
        for j, scores in head_scores(q.index_select(1, picked), k, ctx.kv_len):
            value = v[:, None, :, j].float()
            exact = scores.softmax(-1) @ value  # [B, group, rows, D]
            pair = []
            for hidden in outside:
                error = (scores.masked_fill(hidden, -math.inf).softmax(-1) @ value - exact).square()
                pair.append((error if real is None else error.where(real, 0)).mean((-1, -2)))
            found.append(torch.stack(pair, -1))
        return torch.cat(found, 1)

    # ------------------------------------------------------------------ geometry
    def band(self, kind: str, ctx: LayerContext, device: torch.device) -> Band:
        """The order, blocks and map of one kind; made once per grid."""
        key = ("svg1 band", self, kind, tuple(ctx.grid), ctx.text, ctx.text_first, device)
        if key not in ctx.static:
            with torch.inference_mode(False):  # kept, and maybe saved for a backward later
                ctx.static[key] = self._band(kind, ctx, device)
        band: Band = ctx.static[key]
        return band

    def _band(self, kind: str, ctx: LayerContext, device: torch.device) -> Band:
        frames, frame = ctx.grid[0], ctx.grid[1] * ctx.grid[2]
        sinks = min(self.sinks, frames)
        index = torch.arange(ctx.n_video, device=device)
        if kind == "spatial":
            order, late = index, index[sinks * frame :]  # the token at each position; positions outside the sinks
        else:
            order, late = index.view(frames, frame).T.flatten(), index.view(frame, frames)[:, sinks:].flatten()
        # Queries keep this order. Of the keys the sink frames come first, so that they are one run.
        rows, early, rest = (cut(n, self.block) if n else () for n in (len(order), sinks * frame, len(late)))
        keep = torch.ones(len(rows), len(early) + len(rest), dtype=torch.bool, device=device)
        if rest:
            (q_first, q_last), (k_first, k_last) = _ends(index, rows), _ends(late, rest)
            distance = ((q_first + q_last)[:, None] - (k_first + k_last)).abs().double() / 2  # of the centres
            overlap = (q_first[:, None] <= k_last) & (k_first <= q_last[:, None])
            keep[:, len(early) :] = overlap | (distance <= band_width(self.sparsity, ctx))
        q_order, q_block, q_lengths = _joint(order, rows, ctx)
        kv_order, kv_block, kv_lengths = _joint(torch.cat([index[: sinks * frame], order[late]]), (*early, *rest), ctx)
        if ctx.text:
            keep = torch.nn.functional.pad(keep, (1, 0, 1, 0) if ctx.text_first else (0, 1, 0, 1), value=True)
        return Band(q_order, kv_order, q_lengths, kv_lengths, q_block, kv_block, keep)


def _ends(positions: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first and the last position of every block: int64 [blocks] each."""
    ends = torch.tensor(lengths, device=positions.device).cumsum(0)
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    return positions[starts], positions[ends - 1]


def _joint(order: Tensor, lengths: tuple[int, ...], ctx: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
    """Order int32 [1, 1, N], block of every original token int64 [N], and block lengths [1, 1, blocks], with text."""
    if ctx.text:
        text = torch.arange(ctx.text, device=order.device)
        if ctx.text_first:
            order, lengths = torch.cat([text, order + ctx.text]), (ctx.text, *lengths)
        else:
            order, lengths = torch.cat([order, text + len(order)]), (*lengths, ctx.text)
    sizes = torch.tensor(lengths, device=order.device)
    block = torch.arange(len(lengths), device=order.device).repeat_interleave(sizes, output_size=len(order))
    return order.to(torch.int32)[None, None], torch.empty_like(block).scatter_(0, order, block), sizes[None, None]
