"""A planner that runs another one and writes down what it decided, for the demo's pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from vdit_fast.planners.base import Decision
from vdit_fast.planners.watching import Watching

if TYPE_CHECKING:
    from vdit_fast.context import LayerContext
    from vdit_fast.plan import AttentionPlan


@dataclass
class PlannedCall:
    """One call that the planner worked on: where, the density of each head, and the seconds of planning.

    ``search`` marks a call that the planner looked at after it had run; a dense one has density 1.
    """

    step: int
    branch: int
    layer: int
    density: list[float]
    seconds: float
    search: bool = False


@dataclass(frozen=True, kw_only=True)
class Recorder(Watching):
    """Runs ``inner`` unchanged; ``calls`` fills up, and ``plans`` keeps the plan of every call of ``keep_layer``.

    Not for production: it is one list for all models that use it, and it copies densities to the host.
    """

    keep_layer: int = -1
    calls: list[PlannedCall] = field(default_factory=list, compare=False, repr=False)
    plans: list[tuple[int, AttentionPlan]] = field(default_factory=list, compare=False, repr=False)

    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        start = time.perf_counter()
        decision = self.inner.decision(q, k, v, ctx)
        seconds = time.perf_counter() - start
        plan, observe = decision.plan, decision.observe
        if plan is None and observe is None:
            return decision
        density = [1.0] * q.size(2)
        if plan is not None:
            density = plan.density_per_head.float().mean(0).expand(q.size(2)).tolist()
            if ctx.layer == self.keep_layer and ctx.step.branch == 0:
                self.plans.append((ctx.step.step, plan))
        call = PlannedCall(ctx.step.step, ctx.step.branch, ctx.layer, density, seconds, observe is not None)
        self.calls.append(call)
        if observe is None:
            return decision

        def timed(out: Tensor, lse: Tensor) -> None:
            begin = time.perf_counter()
            observe(out, lse)
            call.seconds += time.perf_counter() - begin

        return replace(decision, observe=timed)
