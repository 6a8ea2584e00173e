"""Attention calls of a dense run, kept to try planners on them without running the model again."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vdit_fast.cli.mass import Weights, sample_rows
from vdit_fast.planners.base import Decision, Planner

if TYPE_CHECKING:
    from vdit_fast.context import LayerContext


@dataclass(frozen=True)
class Call:
    """One attention call: tensors ``[B, N, H, D]`` and its place, and exact weights of some rows of each head."""

    q: Tensor
    k: Tensor
    v: Tensor
    ctx: LayerContext
    weights: list[Weights]

    @cached_property
    def out(self) -> Tensor:
        """Dense attention's output."""
        from vdit_fast.ops.attention import attention

        return cast(Tensor, attention(self.q, self.k, self.v, kv_len=self.ctx.kv_len))


@dataclass(frozen=True, kw_only=True)
class Recording(Planner):
    """A planner that keeps every call dense and stores those of some steps and layers (first guidance branch)."""

    steps: Collection[int] = ()
    layers: Collection[int] = ()
    rows: int = 32
    calls: list[Call] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._set("name", "recording")  # on the object: as a class attribute it would enter the registry
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        return {"method": "recording"}

    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        if ctx.step.step in self.steps and ctx.layer in self.layers and ctx.step.branch == 0:
            rows = sample_rows(ctx, self.rows, q.device)
            heads = range(q.shape[2])
            weights = [Weights.of(q, k, ctx, rows, batch=b, head=h) for b in range(q.shape[0]) for h in heads]
            own = replace(ctx, state={})
            self.calls.append(Call(q.clone(), k.clone(), v.clone(), own, weights))
        return Decision(reason="recorded")


@dataclass(frozen=True)
class Replayed:
    """What a planner did on a recording.

    Attributes:
        density: of the plans, mean over sparse calls and heads; None when every call stayed dense.
        recall: attention mass that they read, mean over the sampled queries.
        best: most mass that any selection of as many pairs holds.
        error: relative L2 error of the attention output, mean over calls and heads.
        corrected: whether a row scale, a residual or stand-ins make up for what is not read.
        reasons: why calls stayed dense.
    """

    density: float | None
    recall: float | None
    best: float | None
    error: float | None
    corrected: bool
    reasons: tuple[str, ...]


def replay(planner: Planner, calls: Sequence[Call], *, recall: bool = False) -> Replayed:
    """Let a planner decide on recorded calls, in their order, as in one generation."""
    from vdit_fast.ops.attention import attention

    state: dict[Any, Any] = {}
    density: list[float] = []
    kept: list[float] = []
    best: list[float] = []
    errors: list[float] = []
    corrected, reasons = False, dict[str, None]()
    for call in calls:
        ctx = replace(call.ctx, state=state)
        with torch.no_grad():
            decision = planner.decision(call.q, call.k, call.v, ctx)
            if decision.observe is not None:
                result: Any = attention(call.q, call.k, call.v, decision.plan, kv_len=ctx.kv_len, return_lse=True)
                decision.observe(*result)
        plan = decision.plan
        if plan is None:
            reasons[decision.reason or "dense"] = None
            continue
        density.append(plan.density)
        corrected = corrected or decision.corrected
        if recall:
            errors += _errors(decision, call)
            for weights in call.weights:
                part, mass = weights.kept(plan)
                kept.append(mass)
                best.append(weights.best([part])[0])
    return Replayed(
        statistics.fmean(density) if density else None,
        statistics.fmean(kept) if kept else None,
        statistics.fmean(best) if best else None,
        statistics.fmean(errors) if errors else None,
        corrected,
        tuple(reasons),
    )


def _errors(decision: Decision, call: Call) -> list[float]:
    """Relative L2 error of each head's output."""
    from vdit_fast.ops.attention import attention

    out: Any = attention(call.q, call.k, call.v, decision.plan, row_scale=decision.row_scale, kv_len=call.ctx.kv_len)
    out = out if decision.residual is None else out + decision.residual
    missed, whole = (x.float().square().sum((0, 1, 3)) for x in (out - call.out, call.out))
    return cast("list[float]", (missed / whole.clamp(min=1e-30)).sqrt().tolist())
