"""The cache policy base: which steps are computed, what is kept of them, and how the others are forecast from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import methods
from . import checks

if TYPE_CHECKING:
    from ..context import StepContext
    from .stream import Stream

REGISTRY: dict[str, type[CachePolicy]] = {}
"""Every policy class by its ``name``; a subclass with a name enters it when it is defined."""

GRANULARITIES = ("model", "span", "block", "module")
"""What is cached, from the least memory to the most."""

STORAGE = ("auto", "fp32", "bf16", "fp16", "float8_e4m3fn")

SIGMA_SLACK = 1e-6
"""Noise levels come from fp32 timesteps: 1 - 0.8 is 0.19999999 there, and counts as 0.2."""


@dataclass(frozen=True, kw_only=True)
class CachePolicy:
    """Decides per step what of the transformer runs, and how the rest is forecast.

    A policy is an immutable bag of settings; what it remembers lives in a ``Stream`` per guidance branch.

    Common knobs:
        granularity: what is kept and forecast: ``"model"`` the transformer's output, ``"span"`` what a range of blocks
            adds to the residual streams, ``"block"`` what every block adds, ``"module"`` the outputs of attention,
            cross-attention and feed-forward before their gates.
        first_full: an int n computes the first n steps; a float in [0, 1) the first floor(first_full · steps). Early
            steps decide what the clip shows. They count from the first step that the transformer sees: the second
            expert of Wan 2.2 and video-to-video begin later in the schedule.
        last_full: the last n steps are computed (known only with a scheduler).
        full_above, full_below: steps whose noise level sigma is at least, at most this are computed; None: none for
            that reason. Unlike steps they mean the same in a part of a schedule.
        interval: after that, every interval-th step is computed and those between are forecast; 1 computes all.
        min_steps: schedules of fewer steps are computed as a whole: a student of 4 steps has nothing to forecast.
        storage: dtype of what is kept: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"float8_e4m3fn"`` with a fp32 scale per
            row of the last dimension, or ``"auto"``: fp32 for ``"model"``, else the features' own.
        max_bytes: most bytes kept in one transformer, an int or text such as "8 GB" or "512 MiB"; more is refused
            before anything is allocated. None: no limit.
        offload: keep factors in CPU memory between uses.

    Raises:
        TypeError, ValueError: a knob has a wrong type or value; the message names it.
    """

    name: ClassVar[str] = ""
    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES
    """Those that suit the policy."""

    granularity: str = "model"
    first_full: int | float = 0.3
    last_full: int = 1
    full_above: float | None = None
    full_below: float | None = None
    interval: int = 2
    min_steps: int = 0
    storage: str = "auto"
    max_bytes: int | str | None = None
    offload: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods.enter(REGISTRY, cls, "cache policy")

    def __post_init__(self) -> None:
        checks.choice(f"granularity of {self.name}", self.granularity, self.granularities)
        checks.part_or_count("first_full", self.first_full)
        checks.count("last_full", self.last_full, 0)
        for knob in ("full_above", "full_below"):
            checks.optional_fraction(knob, getattr(self, knob))
        checks.count("interval", self.interval, 1)
        checks.count("min_steps", self.min_steps, 0)
        checks.choice("storage", self.storage, STORAGE)
        checks.switch("offload", self.offload)
        if self.max_bytes is not None:
            checks.size("max_bytes", self.max_bytes)

    # ------------------------------------------------------------------ when
    def idle(self, step: StepContext) -> str | None:
        """Why nothing of this schedule can be forecast, so that nothing need be kept; None where something can."""
        if step.num_steps is not None and step.num_steps < self.min_steps:
            return f"a schedule of {step.num_steps} steps, fewer than min_steps {self.min_steps}"
        return None

    def decide(self, step: StepContext, stream: Stream) -> str | None:
        """None when this step is forecast, else the reason why it is computed (one line for the report)."""
        if step.step < 0:
            return "the denoising step is unknown"
        if (reason := self.idle(step)) is not None:
            return reason
        return self._first(step, stream) or self._noise(step) or self._rhythm(step, stream)

    def _first(self, step: StepContext, stream: Stream) -> str | None:
        first, total = self.first_full, step.num_steps
        if isinstance(first, float) and total is None:
            return "first_full is a fraction but the number of steps is unknown" if first else None
        if isinstance(first, float):
            first = math.floor(first * (total or 0) + 1e-9)  # 0.29 * 100 is 28.999999999999996 in binary
        begin = stream.first if stream.first >= 0 else step.step
        if step.step - begin < first:
            return f"one of the first {first} steps"
        if total is not None and step.step >= total - self.last_full:
            return f"one of the last {self.last_full} steps"
        return None

    def _noise(self, step: StepContext) -> str | None:
        if self.full_above is None and self.full_below is None:
            return None
        if step.sigma is None:
            return "full_above or full_below is set but the noise level is unknown"
        if self.full_above is not None and step.sigma >= self.full_above - SIGMA_SLACK:
            return f"sigma is at least {self.full_above:g}"
        if self.full_below is not None and step.sigma <= self.full_below + SIGMA_SLACK:
            return f"sigma is at most {self.full_below:g}"
        return None

    def _rhythm(self, step: StepContext, stream: Stream) -> str | None:
        if stream.step < 0:
            return "nothing to forecast from yet"
        if step.step <= stream.step:
            return "the step is not later than the last computed one"
        if step.step - stream.step >= self.interval:
            return f"interval {self.interval}"
        return None

    # ------------------------------------------------------------------ what
    def span(self, step: StepContext, blocks: int) -> tuple[int, int]:
        """The range of blocks that a forecast step leaves out, of a transformer with so many; not for "model"."""
        return 0, blocks

    @property
    def degree(self) -> int:
        """Highest difference that forecasts use."""
        return 0

    def weights(self, distance: int, known: int) -> list[float]:
        """Factors of F_0 ... F_{known - 1} in a forecast, ``distance`` steps after the last computed one."""
        return [1.0]

    # ------------------------------------------------------------------ dict form
    def to_dict(self) -> dict[str, Any]:
        """{"method": name, knob: value, ...} in plain JSON/YAML types; ``from_dict`` reads it back."""
        return methods.to_mapping(self)


def from_dict(data: Mapping[str, Any]) -> CachePolicy:
    """Build a policy from {"method": name, knob: value, ...}; raises what ``methods.build`` raises."""
    return methods.build(REGISTRY, data, "cache policy", '{"method": "taylorseer", "interval": 2}')
