"""Δ-DiT: what a span of blocks adds is kept and added again; the rear span early in sampling, the front span late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import checks
from .base import SIGMA_SLACK, CachePolicy

if TYPE_CHECKING:
    from ..context import StepContext
    from .stream import Stream


@dataclass(frozen=True, kw_only=True)
class DeltaDiT(CachePolicy):
    """Δ-DiT (Chen et al., arXiv 2406.01125).

    At a computed step the offset of a span of ``length`` blocks is kept, x_out − x_in; the steps between add it to
    their own x_in, so that what the newest latent changed still flows. Front blocks shape outlines, rear blocks
    details: the rear span is left out while outlines emerge, before ``bound``, and the front span after it. The step at
    which the span changes is computed.

    Knobs besides those of ``CachePolicy`` (whose ``first_full`` is 1 here, the paper's, and ``granularity`` "span"):
        bound: where the span changes: an int is a step, a float a fraction of the schedule. Where the number of steps
            is unknown, a fraction is reached when 1 − sigma reaches it.
        length: blocks in the span: a number of at least 1, or a float in (0, 1), a fraction of the blocks. The paper
            derives it from a compute budget by a formula that takes the blocks' cost; here it is given.

    Raises:
        TypeError, ValueError: a bad knob, or a length beyond the transformer's blocks.
    """

    name: ClassVar[str] = "delta_dit"
    granularities: ClassVar[tuple[str, ...]] = ("span",)

    granularity: str = "span"
    first_full: int | float = 1
    bound: int | float = 0.5
    length: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.part_or_count("bound", self.bound)
        if isinstance(self.length, float):
            if not 0 < self.length < 1:
                raise ValueError(f"length must be a number of blocks or a fraction in (0, 1), got {self.length}")
        else:
            checks.count("length", self.length, 1)

    def decide(self, step: StepContext, stream: Stream) -> str | None:
        reason = super().decide(step, stream)
        if reason is None and self._late(step) is None:
            return f"bound {self.bound} is set but the number of steps is unknown"
        return reason

    def _late(self, step: StepContext) -> bool | None:
        """Whether the bound is behind; None when that cannot be known."""
        if isinstance(self.bound, int) or step.num_steps is not None:
            bound = self.bound if isinstance(self.bound, int) else math.floor(self.bound * (step.num_steps or 0) + 1e-9)
            return step.step >= bound
        return None if step.sigma is None else 1.0 - step.sigma >= self.bound - SIGMA_SLACK

    def span(self, step: StepContext, blocks: int) -> tuple[int, int]:
        length = max(1, math.floor(self.length * blocks + 1e-9)) if isinstance(self.length, float) else self.length
        if length > blocks:
            raise ValueError(f"length is {length} but the transformer has {blocks} blocks; give at most {blocks}")
        return (0, length) if self._late(step) else (blocks - length, blocks)
