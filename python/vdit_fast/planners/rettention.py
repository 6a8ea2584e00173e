"""Re-ttention: a thin window, its output scaled and completed by what dense steps said about the rest."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import ops
from . import _checks
from ._memory import slot
from ._tokens import TEXT_BLOCK, cut
from .base import Decision, Planner

if TYPE_CHECKING:
    from ..context import LayerContext, StepContext
    from ..plan import AttentionPlan

TILE_ROWS = 128
"""Query rows per tile where the frames allow it, what the widest kernel takes at once."""


@dataclass(frozen=True, eq=False)
class _Measured:
    """What a caching step leaves: rho fp32 [B, H, N] and the residual [B, N, H, D]. `same` says for which inputs."""

    same: Hashable
    step: int
    rho: Tensor
    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class Rettention(Planner):
    """Re-ttention (arXiv 2505.22918).

    Every video token reads the tokens of all frames whose in-frame index (row · width + column) is at most ⌊w/2⌋ away
    from its own, w = ⌊window · height · width⌋. Softmax over so few keys gives them too much weight. So every
    `interval`-th step is a *caching step*: dense, and besides it measures, against the window's output O_w,

        ρ = exp(lse_w − lse)        the attention mass of the window, per head and row
        R = O − ρ · O_w             exactly the part of the keys outside

    The steps between return (ρ + λ·(m − 1)) · O_w + R, m being the number of steps since the caching step, λ =
    `increment`. The schedule is the paper's: dense_steps, then a caching step, and again every `interval` steps.

    The tokens are put in token-major order (in-frame index · F + frame), where a window is one run of keys. A tile of
    queries holds about 128 rows, all frames of a few neighbouring places, and reads the union of their windows.

    Different from the paper's code: ρ of text rows, which read everything, is not raised; m counts steps, not calls,
    so that a step skipped by a feature cache counts too, and a caching step that was missed is made up for at the
    next call; R is taken before the output projection (which is linear, so only rounding differs).

    Memory: layers · streams · B·N·H·(D·itemsize + 4) bytes per transformer (`state_bytes`), a stream being a guidance
    branch or frame block; Wan 14B at 720 × 1280 with 81 frames takes 31 GB per branch. More than `max_bytes` is
    refused before anything is kept.

    Knobs besides those of `Planner` (whose `dense_steps` is 0.3 here: 15 of the paper's 50):
        window: w as a fraction of the frame's tokens, in [0, 1]; 1 means the whole frame. Text and sinks come on top.
        interval: steps from one caching step to the next, at least 1 (all are dense).
        increment: λ, by which ρ grows per step.
        clamp: keep ρ at most 1, which the paper does not.
        max_bytes: most bytes of ρ and R in one transformer.

    Raises:
        ValueError, TypeError: a bad knob; in `decision`, ρ and R would need more than `max_bytes`.
    """

    name: ClassVar[str] = "rettention"

    dense_steps: int | float = 0.3
    window: float = 0.03125
    interval: int = 5
    increment: float = 0.04
    clamp: bool = False
    max_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("window", _checks.number("window", self.window, least=0, most=1))
        self._set("interval", _checks.count("interval", self.interval, least=1))
        self._set("increment", _checks.number("increment", self.increment, least=0))
        _checks.switch("clamp", self.clamp)
        self._set("max_bytes", _checks.count("max_bytes", self.max_bytes))

    @property
    def remembers(self) -> bool:
        return True

    # ------------------------------------------------------------------ one call
    def decide(self, ctx: LayerContext) -> str | None:
        reason = super().decide(ctx)
        return reason or ("the denoising step is unknown" if ctx.step.step < 0 else None)

    def observes(self, step: StepContext) -> str | None:
        dense, total = self.dense_steps, step.num_steps
        if step.step < 0 or (isinstance(dense, float) and dense and total is None):
            return None
        first = dense if isinstance(dense, int) else math.floor(dense * (total or 0) + 1e-9)
        due = step.step >= first and (step.step - first) % self.interval == 0
        return "rettention measures in this step" if due else None

    @torch.no_grad()
    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        never = self._dense_layer(ctx) or self._dense_size(ctx)
        if never is not None:
            return Decision(reason=never)
        self.check_inputs(q, k, ctx)
        self._check_budget(q, ctx)  # at the first dense step already, not after a third of the run
        reason = self.decide(ctx)
        if reason is not None:
            return Decision(reason=reason)
        step = ctx.step
        key = slot("rettention", self, ctx)
        same = (step.generation, tuple(ctx.grid), ctx.text, ctx.text_first, *q.shape, k.shape[2], q.dtype, q.device)
        last = step.step + 1 == step.num_steps  # of this stream: nothing later reads what is kept
        known: _Measured | None = ctx.state.get(key)
        age = step.step - known.step if known is not None and known.same == same else 0
        if known is not None and 0 < age < self.interval:
            rho = self._grown(known.rho, age, ctx)
            if last:
                self._forget(key, ctx)
            return Decision(self.plan(q, k, ctx), row_scale=rho, residual=known.residual)

        def observe(out: Tensor, lse: Tensor) -> None:
            if last:
                return
            with torch.inference_mode(False), torch.no_grad():  # what is kept must be ordinary tensors
                rho, residual = self.measure(q, k, v, out, lse, ctx)
                ctx.state[key] = _Measured(same, step.step, rho, residual)

        ctx.state.pop(key, None)  # free the old one before the new one is made
        if last:
            self._forget(key, ctx)
        return Decision(reason=f"step {step.step} measures what the window misses", observe=observe)

    def measure(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ctx: LayerContext
    ) -> tuple[Tensor, Tensor]:
        """(ρ fp32 [B, H, N], R [B, N, H, D] in the output's dtype) from dense attention's output and log-sum-exp."""
        part, part_lse = ops.attention(q, k, v, self.plan(q, k, ctx), kv_len=ctx.kv_len, return_lse=True)
        rho = (part_lse - lse).exp().masked_fill(lse == -math.inf, 0.0)  # an empty row has no window either
        outside = (part.float() * -rho.transpose(1, 2).unsqueeze(-1)).add_(out)
        return rho, outside.to(out.dtype)

    def _grown(self, rho: Tensor, age: int, ctx: LayerContext) -> Tensor:
        """ρ at the age-th step after its caching step."""
        if age > 1 and self.increment:
            rho = rho.clone()
            rho[:, :, ctx.video_slice] += self.increment * (age - 1)
        return rho.clamp(max=1.0) if self.clamp else rho

    # ------------------------------------------------------------------ memory
    @staticmethod
    def state_bytes(
        tokens: int, heads: int, dim: int, *, batch: int = 1, itemsize: int = 2, layers: int = 1, streams: int = 1
    ) -> int:
        """Bytes of ρ and R: layers · streams · batch · tokens · heads · (dim · itemsize + 4).

        `tokens` counts the whole joint sequence, `streams` guidance branches times frame blocks.
        """
        return layers * streams * batch * tokens * heads * (dim * itemsize + 4)

    def _forget(self, key: Hashable, ctx: LayerContext) -> None:
        """Free ρ and R of a stream whose last step this is, such as a finished frame block, and its place."""
        ctx.state.pop(key, None)
        streams: dict[Hashable, int] = ctx.state.get(("rettention streams", self), {})
        streams.pop((ctx.step.branch, ctx.step.expert, ctx.step.frame_block), None)

    def _check_budget(self, q: Tensor, ctx: LayerContext) -> None:
        """Raise ValueError when this stream's ρ and R do not fit beside those of the streams seen before."""
        streams: dict[Hashable, int] = ctx.state.setdefault(("rettention streams", self), {})
        stream = (ctx.step.branch, ctx.step.expert, ctx.step.frame_block)
        batch, tokens, heads, dim = q.shape
        each = self.state_bytes(tokens, heads, dim, batch=batch, itemsize=q.element_size())
        if streams.get(stream) == each:
            return
        layers = sum(self._dense_layer(replace(ctx, layer=i)) is None for i in range(ctx.num_layers))
        per_layer = sum({**streams, stream: each}.values())
        if layers * per_layer > self.max_bytes:
            fit = self.max_bytes // per_layer
            remedy = f"set dense_layers to {ctx.num_layers - fit} or more" if fit else "not even one layer fits"
            raise ValueError(
                f"rettention would keep {layers * per_layer:,} bytes, {layers} layers of {per_layer:,} for "
                f"{len({*streams, stream})} branches or frame blocks (here {batch} · {tokens:,} tokens · {heads} heads "
                f"· ({dim} · {q.element_size()} + 4) bytes), but max_bytes is {self.max_bytes:,}: {fit} layers fit; "
                f"{remedy}, or raise max_bytes"
            )
        streams[stream] = each

    # ------------------------------------------------------------------ window
    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        """The window, which depends on the grid only: [1, 1, N, N]."""
        self.check_inputs(q, k, ctx)
        key = ("rettention window", self, tuple(ctx.grid), ctx.text, ctx.text_first, q.device)
        if key not in ctx.static:
            with torch.inference_mode(False):
                ctx.static[key] = self._window(ctx).to(q.device)
        plan: AttentionPlan = ctx.static[key]
        return plan

    def _window(self, ctx: LayerContext) -> AttentionPlan:
        """Built on the CPU, where a plan's buffers are as short as can be."""
        from ..plan import AttentionPlan

        frames, places = ctx.grid[0], ctx.grid[1] * ctx.grid[2]
        # 1e-9: fractions such as 0.29 of 100 lie just below in binary
        half = places if self.window == 1 else math.floor(self.window * places + 1e-9) // 2
        sinks = min(self.sinks, frames)
        pieces = torch.tensor(cut(places, max(1, TILE_ROWS // frames)))
        ends, place = pieces.cumsum(0)[:, None], torch.arange(places)
        keep = (place >= ends - pieces[:, None] - half) & (place < ends + half)
        # Sink frames would cut every window into one run per place: their keys go in front of all others instead.
        keep = torch.nn.functional.pad(keep, (1, 0), value=True)
        token = torch.arange(ctx.n_video).view(frames, places)
        q_order, kv_order = token.T.flatten(), torch.cat([token[:sinks].flatten(), token[sinks:].T.flatten()])
        q_lengths, kv_lengths = pieces * frames, torch.tensor([sinks * places] + [frames - sinks] * places)
        if ctx.text:
            first, chunks = ctx.text_first, cut(ctx.text, TEXT_BLOCK)
            sides = (1, 0, len(chunks), 0) if first else (0, 1, 0, len(chunks))
            keep = torch.nn.functional.pad(keep, sides, value=True)
            q_lengths = _joined(torch.tensor(chunks), q_lengths, first)
            kv_lengths = _joined(torch.tensor([ctx.text]), kv_lengths, first)
            words = torch.arange(ctx.num_tokens)[ctx.text_slice]
            q_order, kv_order = (_joined(words, x + ctx.video_slice.start, first) for x in (q_order, kv_order))
        return AttentionPlan.from_block_mask(keep, q_lengths, kv_lengths, q_order=q_order, kv_order=kv_order)


def _joined(text: Tensor, video: Tensor, text_first: bool) -> Tensor:
    return torch.cat([text, video] if text_first else [video, text])
