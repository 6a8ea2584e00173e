"""Region-adaptive sampling: the tokens whose predicted noise varies least are computed, the others coast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..ops.clusters import counting_sort
from ..ops.select import select_top_k
from .base import RowPolicy

if TYPE_CHECKING:
    from ..context import StepContext

_METRICS = ("std", "l2")


@dataclass(frozen=True, kw_only=True)
class RAS(RowPolicy):
    """Region-Adaptive Sampling (Liu et al., arXiv 2502.10389) for token grids of any shape.

    A step from ``start`` on computes ``N − floor((1 − sample_ratio)·N)`` of the N video tokens, all others keep the
    output of their last computed step. The choice falls on the measure of the last output, ``m`` per token, and on
    ``d``, how often the token was left out: left out are the ``round(high_ratio·skip)`` tokens with the largest
    ``m·exp(−starvation·d)`` and, of the rest, those with the smallest ``m·exp(+starvation·d)``. The authors' code
    multiplies by ``exp(+starvation·d)`` on both ends, which makes a token left out for a large measure ever less likely
    to return; here the factor works towards the computed set on either end.

    Knobs besides those of ``RowPolicy``:
        sample_ratio: share of the tokens that is computed, in (0, 1]; 1 computes all and changes no bit.
        start: steps before it compute every token, at least 1. Step ``start − 1`` keeps keys and values.
        reset: further steps that compute every token, which also refreshes all keys and values.
        metric: ``"std"``, the standard deviation over the output's channels, or ``"l2"``, their norm; both averaged
            over the places of a token's patch, and over the batch and the guidance branches, which share one choice.
        starvation: at least 0; 0 switches the memory of left-out tokens off.
        high_ratio: in [0, 1]: 1 leaves out the tokens of the largest measure only, 0 those of the smallest only.

    Raises:
        TypeError, ValueError: a bad knob.
    """

    name: ClassVar[str] = "ras"

    sample_ratio: float = 0.5
    start: int = 4
    reset: tuple[int, ...] = (12, 22)
    metric: str = "std"
    starvation: float = 0.1
    high_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _number("sample_ratio", self.sample_ratio, 1.0)
        if self.sample_ratio <= 0:
            raise ValueError(f"sample_ratio must be in (0, 1], got {self.sample_ratio!r}")
        _number("high_ratio", self.high_ratio, 1.0)
        _number("starvation", self.starvation, math.inf)
        _step("start", self.start, 1)
        if isinstance(self.reset, int) or not isinstance(self.reset, (list, tuple)):
            raise TypeError(f"reset must be a list of steps, got {self.reset!r}")
        for step in self.reset:
            _step("reset", step, 0)
        object.__setattr__(self, "reset", tuple(self.reset))
        if self.metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {self.metric!r}")

    def whole(self, step: StepContext) -> str | None:
        if step.step < 0:
            return "the denoising step is unknown"
        if step.step < self.start:
            return f"one of the first {self.start} steps"
        return "a reset step" if step.step in self.reset else None

    def keeps(self, step: StepContext) -> bool:
        last = step.num_steps is not None and step.step >= step.num_steps - 1
        return step.step >= self.start - 1 and not last

    def active(self, tokens: int) -> int:
        # 0.9 is less than nine tenths in binary, and 0.1 of ten tokens would be none of them
        return max(1, tokens - math.floor((1 - self.sample_ratio) * tokens + 1e-9))

    def measure(self, output: Tensor) -> Tensor:
        x = output.float()
        per_place = x.std(-1, correction=0) if self.metric == "std" else x.norm(dim=-1)
        return per_place.mean((0, 2))

    def choose(self, measure: Tensor, skipped: Tensor) -> Tensor:
        tokens = measure.shape[0]
        active = self.active(tokens)
        skip = tokens - active
        high = math.floor(self.high_ratio * skip + 0.5)
        # in logarithms, where neither the factor nor a measure of 0 leaves fp32
        level, bonus = measure.clamp_min(torch.finfo(torch.float32).tiny).log(), self.starvation * skipped
        left = torch.zeros(tokens, dtype=torch.bool, device=measure.device)
        if high:
            left = select_top_k(level - bonus, high)
        if skip - high:
            left = left | select_top_k((-(level + bonus)).masked_fill(left, -math.inf), skip - high)
        order, _ = counting_sort(left.to(torch.int32)[None, None], 2)
        return order[0, 0, :active]


def _number(knob: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{knob} must be a number, got {value!r}")
    if not (math.isfinite(value) and 0 <= value <= most):
        wanted = "at least 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"{knob} must be {wanted}, got {value!r}")


def _step(knob: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{knob} must be a step number, an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{knob} must be at least {least}, got {value}")
