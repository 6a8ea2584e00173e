"""The cache policy base: when a transformer's output is computed, and what stands in for it when it is not."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import methods

if TYPE_CHECKING:
    from ..context import StepContext

REGISTRY: dict[str, type[CachePolicy]] = {}
"""Every policy class by its ``name``; a subclass with a name enters it when it is defined."""


@dataclass
class Stream:
    """What is remembered of one stream of outputs: one guidance branch of one transformer in one generation."""

    first: int = -1
    """Step of the first computed output, -1 before it."""
    step: int = -1
    """Step of the last computed output, -1 before the first."""
    factors: list[Tensor] = field(default_factory=list)
    """What the policy made of the computed outputs; fp32."""


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Decides per step whether the transformer runs, and forecasts its output when it does not.

    A policy is an immutable bag of settings; what it remembers lives in a ``Stream``.

    Common knobs:
        first_full: an int n computes the first n steps; a float in [0, 1) the first floor(first_full · steps). Early
            steps decide what the clip shows. They count from the first step that the transformer sees: the second
            expert of Wan 2.2 and video-to-video begin later in the schedule.
        last_full: the last n steps are computed (known only with a scheduler).
        interval: after ``first_full``, every interval-th step is computed and those between are forecast; 1 computes
            all.
        min_steps: schedules of fewer steps are computed as a whole: a student of 4 steps has nothing to forecast.

    Raises:
        TypeError, ValueError: a knob has a wrong type or value; the message names it.
    """

    name: ClassVar[str] = ""

    first_full: int | float = 0.3
    last_full: int = 1
    interval: int = 2
    min_steps: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods.enter(REGISTRY, cls, "cache policy")

    def __post_init__(self) -> None:
        if isinstance(self.first_full, float):
            if not (math.isfinite(self.first_full) and 0 <= self.first_full < 1):
                raise ValueError(
                    "first_full must be an int (number of steps) or a float in [0, 1) (fraction of the steps), "
                    f"got {self.first_full!r}"
                )
        else:
            _count("first_full", self.first_full, 0)
        _count("last_full", self.last_full, 0)
        _count("interval", self.interval, 1)
        _count("min_steps", self.min_steps, 0)

    def decide(self, step: StepContext, stream: Stream) -> str | None:
        """None when this step is forecast, else the reason why it is computed (one line for the report)."""
        total = step.num_steps
        if step.step < 0:
            return "the denoising step is unknown"
        if total is not None and total < self.min_steps:
            return f"a schedule of {total} steps, fewer than min_steps {self.min_steps}"
        if isinstance(self.first_full, float) and total is None:
            return "first_full is a fraction but the number of steps is unknown"
        first = self.first_full
        if isinstance(first, float):
            first = math.floor(first * (total or 0) + 1e-9)  # 0.29 * 100 is 28.999999999999996 in binary
        begin = stream.first if stream.first >= 0 else step.step
        if step.step - begin < first:
            return f"one of the first {first} steps"
        if total is not None and step.step >= total - self.last_full:
            return f"one of the last {self.last_full} steps"
        if not stream.factors:
            return "nothing to forecast from yet"
        if step.step <= stream.step:
            return "the step is not later than the last computed one"
        if step.step - stream.step >= self.interval:
            return f"interval {self.interval}"
        return None

    @abstractmethod
    def update(self, stream: Stream, step: int, output: Tensor) -> None:
        """Take note of an output that was computed at ``step``, which is later than ``stream.step``."""

    @abstractmethod
    def forecast(self, stream: Stream, step: int) -> Tensor:
        """The output at ``step``, forecast from the stream: fp32, the shape of the computed ones."""

    def to_dict(self) -> dict[str, Any]:
        """{"method": name, knob: value, ...} in plain JSON/YAML types; ``from_dict`` reads it back."""
        return methods.to_mapping(self)


def from_dict(data: Mapping[str, Any]) -> CachePolicy:
    """Build a policy from {"method": name, knob: value, ...}; raises what ``methods.build`` raises."""
    return methods.build(REGISTRY, data, "cache policy", '{"method": "taylorseer", "interval": 2}')


def _count(knob: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{knob} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{knob} must be at least {least}, got {value}")
