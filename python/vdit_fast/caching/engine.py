"""The feature cache of one transformer: which forwards are computed, what is kept of them, and what is forecast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import budget
from .adaptive import AdaptivePolicy
from .stream import Factors, Stream

if TYPE_CHECKING:
    from ..context import StepContext
    from ..models.blocks import BlockCall
    from ..models.forward import Forward
    from ..planners import Planner
    from ..subset import RowPolicy
    from .base import CachePolicy
    from .features import Features

__all__ = ["FeatureCache", "Run", "joined_phase"]


@dataclass
class Run:
    """One forward of the transformer under the policy."""

    step: int
    stream: Stream
    span: tuple[int, int] = (0, 0)
    """Blocks that are left out where the step is forecast."""
    reason: str | None = None
    """Why the step is computed, None where it is forecast."""
    pending: bool = False
    """Whether an adaptive policy has yet to look."""
    leads: bool = False
    """Whether an adaptive policy looks at this branch, which the others follow."""
    called: set[int] = field(default_factory=set)
    """Blocks that were called; a second call is none of the cache's."""
    state: Any = None
    """What the granularity needs while the forward runs."""


class FeatureCache:
    """The streams of one transformer, and what was computed and forecast so far. Stands around its blocks, except at
    granularity "model", where ``CachedForward`` asks it.

    Args:
        policy: None where nothing is cached.
        planner: whose steps of observation are computed.
        subset: whose steps on all tokens are computed.
    """

    def __init__(
        self, policy: CachePolicy | None = None, planner: Planner | None = None, subset: RowPolicy | None = None
    ) -> None:
        self.policy = policy
        self.planner = planner
        self.subset = subset
        self._observes: Any = getattr(planner, "observes", None)
        self.full: Counter[str] = Counter()
        """Reason -> computed forwards."""
        self.forecasts: Counter[int] = Counter()
        """Step -> forecast forwards."""
        self.blocks_run = 0
        self.blocks_left_out = 0
        self.host_reads = 0
        """Scalars that an adaptive policy has read."""
        self.hooked: dict[str, int] = {}
        """What the cache stands around -> how many of them."""
        self.forward: Forward | None = None
        """The running forward; the session sets it."""
        self.features: Features | None = None
        """What is kept of blocks; None at granularity "model"."""
        self.per_token = 0
        """Numbers of the transformer's output per video token; 0: not known."""
        self.modulated: Callable[[BlockCall], Tensor] | None = None
        """The timestep-modulated input of a block's attention, where a policy looks at it."""
        self.phase: Callable[[StepContext], Hashable] | None = None
        """What the forwards of a step compute, where that changes with steps: features of one phase say nothing of
        another's. The session sets it."""
        self._generation: int | None = None
        self._streams: dict[tuple[str, int, int | None], tuple[tuple[Hashable, Hashable], Stream]] = {}
        self._verdicts: dict[tuple[str, int | None], tuple[int, str | None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(stream.nbytes for _, stream in self._streams.values())

    def forget(self) -> None:
        """Release what is held; the counts stay."""
        self._streams.clear()
        self._verdicts.clear()

    def release(self, frame_block: int) -> None:
        """Release what is held of one frame block."""
        tables: tuple[dict[Any, Any], ...] = (self._streams, self._verdicts)
        for held in tables:
            for key in [key for key in held if key[-1] == frame_block]:
                del held[key]

    def fresh(self) -> FeatureCache:
        """The same settings without records, for a copied model."""
        new = FeatureCache(self.policy, self.planner, self.subset)
        new.hooked, new.modulated, new.per_token = dict(self.hooked), self.modulated, self.per_token
        new.features = self.features.of(new) if self.features is not None else None
        return new

    # ------------------------------------------------------------------ one forward
    def stream(self, step: StepContext, signature: Hashable) -> Stream:
        """What is remembered of this guidance branch: nothing in a new generation, or where sizes have changed; where
        the phase has, no more than the step it began with."""
        if step.generation != self._generation:
            self._generation = step.generation
            self.forget()
        key = (step.expert, step.branch, step.frame_block)  # one transformer may run under several names
        whole = signature, self.phase(step) if self.phase is not None and step.step >= 0 else None
        known = self._streams.get(key)
        if known is None or known[0] != whole:
            self._streams.pop(key, None)  # its memory before the new one's
            goes_on = known is not None and known[0][1] != whole[1]  # with the phase, sizes may have changed
            known = self._streams[key] = whole, Stream(first=known[1].first if known and goes_on else -1)
        return known[1]

    def reason(self, step: StepContext, stream: Stream) -> str | None:
        """Why a step is computed whatever an adaptive policy would say, None where it need not be."""
        assert self.policy is not None
        reason = self.policy.decide(step, stream) or (self._observes(step) if self._observes is not None else None)
        return reason or (self.subset.whole(step) if self.subset is not None else None)

    def refused(self, step: StepContext) -> bool:
        """Count a forward that no policy is asked about; False where one is."""
        if torch.is_grad_enabled():
            self.full["gradients are recorded"] += 1
        elif step.step < 0:
            self.full["the denoising step is unknown"] += 1
        elif self.policy is not None and (idle := self.policy.idle(step)) is not None:
            self.full[idle] += 1
        else:
            return False
        return True

    def settle(self, run: Run) -> None:
        """It is known whether a forward is computed: count it."""
        if run.reason is None:
            self.forecasts[run.step] += 1
        else:
            self.full[run.reason] += 1
            run.stream.begin(run.step)

    def _begin(self, forward: Forward, call: BlockCall) -> Run | None:
        policy, features, step = self.policy, self.features, forward.step
        assert policy is not None and features is not None
        if self.refused(step):
            return None
        stream = self.stream(step, _signature(call.arguments))
        run = Run(step.step, stream, policy.span(step, call.block.count))
        run.reason = self.reason(step, stream) or features.missing(run)
        if isinstance(policy, AdaptivePolicy):
            place = step.expert, step.frame_block
            known = self._verdicts.get(place)
            run.leads = step.branch == 0 or known is None or known[0] != step.step
            if run.leads:
                run.pending = run.reason is None
                self._verdicts[place] = step.step, run.reason
            elif run.reason is None and known is not None:
                run.reason = known[1]
        if not run.pending:
            self.settle(run)
        return run

    def _look(
        self, run: Run, forward: Forward, feature: Tensor, total: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Ask an adaptive policy about what it looks at. ``total`` adds up over ranks that have some rows each: all of
        them must leave out the same blocks."""
        policy, stream = self.policy, run.stream
        assert isinstance(policy, AdaptivePolicy)
        if run.pending:
            run.pending = False
            if stream.seen is None:
                run.reason = "nothing to compare with yet"
            else:
                self.host_reads += 1
                if total is None:
                    change = (feature - stream.seen).abs().mean(dtype=torch.float32)
                    before = stream.seen.abs().mean(dtype=torch.float32)
                else:
                    parts = [(feature - stream.seen).abs(), stream.seen.abs()]
                    change, before = total(torch.stack([part.sum(dtype=torch.float32) for part in parts]))
                run.reason = policy.verdict(stream, float(change / before))
            self._verdicts[forward.step.expert, forward.step.frame_block] = run.step, run.reason
            self.settle(run)
        policy.keep(stream, feature, run.reason is not None)

    # ------------------------------------------------------------------ one block
    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        forward, features = self.forward, self.features
        if forward is None or features is None:
            return proceed()
        if not forward.cached:
            forward.cached = True
            forward.run = self._begin(forward, call)
        run: Run | None = forward.run
        if run is None or call.block.index in run.called:
            return proceed()
        first_call = not run.called
        run.called.add(call.block.index)
        looks = self.policy.looks_at if isinstance(self.policy, AdaptivePolicy) and run.leads and first_call else ""
        if looks == "input":
            assert self.modulated is not None
            self._look(run, forward, self.modulated(call), call.session.total)
        inside = run.span[0] <= call.block.index < run.span[1]
        if inside and run.reason is None:
            output = features.forecast(run, call)
            if output is not None:
                self.blocks_left_out += 1
                return output
        self.blocks_run += 1
        if inside and run.reason is not None:
            return features.compute(run, call, proceed)
        before = call.inputs[0]
        output = proceed()
        if looks == "first block":
            after = output if isinstance(output, Tensor) else output[0]
            assert before is not None
            self._look(run, forward, after - before, call.session.total)
        return output

    # ------------------------------------------------------------------ memory
    def factors(self, run: Run, key: Hashable, like: Tensor, dtype: torch.dtype | None = None) -> Factors:
        """The factors of one feature of the forward's stream; new ones at its first computed forward. ``dtype`` is that
        of the residual stream where it may be another one than the feature's."""
        found = run.stream.factors.get(key)
        if found is None:
            policy = self.policy
            assert policy is not None
            kept = budget.storage_dtype(policy, dtype or like.dtype)
            budget.check_rows(like.shape, kept)
            found = Factors(like.shape, policy.degree, kept, like.device, policy.offload)
            run.stream.factors[key] = found
        return found

    def weights(self, run: Run, factors: Factors) -> list[float]:
        """Of the factors in this forward's forecast."""
        assert self.policy is not None
        return self.policy.weights(run.step - factors.step, factors.known)

    def afford(self, run: Run, sizes: budget.Sizes, dtype: torch.dtype, batch: int) -> None:
        """Refuse a stream's first factors where they exceed the budget, before any is allocated."""
        if run.stream.granted:
            return
        assert self.policy is not None
        if "model" not in sizes and (output := self._output_size(batch)) is not None:
            sizes = {**sizes, "model": output}
        branches = 1 if self.forward is None else self.forward.step.branches
        held = sum(stream.factor_bytes for _, stream in self._streams.values())
        budget.check(self.policy, sizes, dtype, held=held, branches=branches)
        run.stream.granted = True

    def _output_size(self, batch: int) -> budget.Size | None:
        """Of the running forward's result, before it is there."""
        forward = self.forward
        if not self.per_token or forward is None or forward.geometry is None:
            return None
        elements = batch * forward.geometry.n_video * self.per_token
        width = forward.geometry.grid[-1]
        row = forward.latent_row // width * width or self.per_token  # a last patch that is not whole is left out
        return budget.Size(elements, elements // row)


def joined_phase(*parts: Any) -> Callable[[StepContext], Hashable] | None:
    """``FeatureCache.phase`` of all that have a method ``phase`` of the step, None where nobody has."""
    found = [phase for part in parts if callable(phase := getattr(part, "phase", None))]
    return (lambda step: tuple(phase(step) for phase in found)) if found else None


def _signature(arguments: dict[str, Any]) -> Hashable:
    """What must not change between a computed step and its forecast."""
    tensors = ((name, value) for name, value in arguments.items() if isinstance(value, Tensor))
    return tuple((name, tuple(value.shape), value.dtype, value.device) for name, value in tensors)
