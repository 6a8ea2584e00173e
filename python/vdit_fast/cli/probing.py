"""A planner that keeps a run dense while it measures what another one would do, and where the attention lies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vdit_fast.cli.mass import DENSITIES, Weights, best_blocks, sample_rows
from vdit_fast.models.ledger import Span, stamp
from vdit_fast.ops.attention import attention
from vdit_fast.planners.base import Decision
from vdit_fast.planners.watching import Watching

if TYPE_CHECKING:
    from vdit_fast.context import LayerContext
    from vdit_fast.plan import AttentionPlan

LOOKS = (0.35, 0.65, 0.95)
"""Where in the schedule the attention is looked at, as fractions of it."""
TURNS = 3


@dataclass
class Look:
    """One head at one step: the first batch item of the first guidance branch.

    Attributes:
        best: mass of the best selection of single pairs, at ``mass.DENSITIES``.
        blocks: that of the best square blocks of consecutive tokens, at the same densities.
        near_frames, near_places: ``Weights.character``.
        density, recall, reachable: what the planner reads of the sampled queries, the mass that it holds, and the most
            that as many pairs can hold; None where it keeps the call dense.
    """

    step: int
    layer: int
    head: int
    best: list[float]
    blocks: list[float]
    near_frames: float
    near_places: float
    text: float
    density: float | None = None
    recall: float | None = None
    reachable: float | None = None


@dataclass
class Timing:
    """One looked-at call: seconds of dense attention and of the plan's, medians of a few turns, and its density."""

    dense: float
    sparse: float
    density: float


@dataclass
class Notes:
    """What a probe wrote down.

    Attributes:
        corrected: whether a row scale, a residual or stand-ins make up for what the planner does not read.
    """

    looks: list[Look] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    plans: list[tuple[int, int, AttentionPlan]] = field(default_factory=list)
    planning: Span = field(default_factory=Span)
    observing: Span = field(default_factory=Span)
    calls: int = 0
    planned: int = 0
    sparse: int = 0
    corrected: bool = False
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probe(Watching):
    """Asks ``inner`` about every call and runs it dense; three times in a generation it looks closer.

    Args:
        rows: sampled queries per head.
        block: side of the square blocks of ``Look.blocks``.
    """

    rows: int = 64
    block: int = 64
    notes: Notes = field(default_factory=Notes, compare=False, repr=False)

    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        notes = self.notes
        begin = stamp(q.device)
        decision = self.inner.decision(q, k, v, ctx)
        end = stamp(q.device)
        notes.calls += 1
        notes.sparse += decision.plan is not None
        notes.corrected = notes.corrected or decision.corrected
        if decision.plan is not None or decision.observe is not None:
            notes.planned += 1
            notes.planning.add(begin, end)
        if decision.plan is None:
            reason = decision.reason or "the planner keeps it dense"
            notes.reasons[reason] = notes.reasons.get(reason, 0) + 1
        if self._wanted(ctx):
            self._look(q, k, v, ctx, decision)
        observe = decision.observe
        if observe is None:
            return Decision(reason="measured")

        def timed(out: Tensor, lse: Tensor) -> None:
            start = stamp(q.device)
            observe(out, lse)
            notes.observing.add(start, stamp(q.device))

        return Decision(reason="measured", observe=timed)

    def _wanted(self, ctx: LayerContext) -> bool:
        step = ctx.step
        if step.branch != 0 or step.step < 0:
            return False
        if step.num_steps is None:
            return step.step % 10 == 5
        return step.step in {round(part * (step.num_steps - 1)) for part in LOOKS}

    def _look(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext, decision: Decision) -> None:
        plan = decision.plan
        rows = sample_rows(ctx, self.rows, q.device)
        count = max(1, self.rows // self.block) * 2
        blocks = best_blocks(q[:1], k[:1], _first(ctx), DENSITIES, block=self.block, count=count)[0]
        for head in range(q.shape[2]):
            weights = Weights.of(q, k, ctx, rows, batch=0, head=head)
            frames, places = weights.character(ctx)
            look = Look(ctx.step.step, ctx.layer, head, weights.best(DENSITIES), blocks[head], frames, places, 0.0)
            look.text = weights.text(ctx)
            if plan is not None:
                look.density, look.recall = weights.kept(plan)
                look.reachable = weights.best([look.density])[0]
            self.notes.looks.append(look)
        if plan is not None:
            self.notes.plans.append((ctx.step.step, ctx.layer, plan))
            self.notes.timings.append(_compare(q, k, v, decision, plan.density, ctx.kv_len))


def _first(ctx: LayerContext) -> LayerContext:
    """The context of the first batch item alone."""
    return ctx if ctx.kv_len is None else replace(ctx, kv_len=ctx.kv_len[:1])


def _compare(q: Tensor, k: Tensor, v: Tensor, decision: Decision, density: float, kv_len: Tensor | None) -> Timing:
    """Dense attention and the decided call, row scale and residual included, of the same tensors, in turns."""

    def run(which: Decision) -> Tensor:
        out = cast(Tensor, attention(q, k, v, which.plan, row_scale=which.row_scale, kv_len=kv_len))
        return out if which.residual is None else out + which.residual

    dense: list[float] = []
    sparse: list[float] = []
    for turn in range(TURNS + 1):
        for which, series in ((Decision(), dense), (decision, sparse)):
            seconds = _seconds(partial(run, which), q.device)
            if turn:
                series.append(seconds)
    return Timing(statistics.median(dense), statistics.median(sparse), density)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
