"""Policies that look at a feature in every step, and compute the rest when it has changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import checks
from .base import CachePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from .stream import Stream


@dataclass(frozen=True, kw_only=True)
class AdaptivePolicy(CachePolicy, ABC):
    """Base of the policies whose rhythm follows what happens.

    The rule is asked where the common knobs leave a step to it. The first guidance branch of a step decides, and the
    others follow: branches that are partly computed, partly forecast would be combined with different errors. One
    scalar per step is read on the host.

    Knobs besides those of ``CachePolicy`` (whose ``granularity`` is "span", and whose ``interval``, the most steps from
    one computed step to the next, is 5):
        threshold: relative change, mean|now − before| / mean|before|, below which a step is forecast; at least 0.
    """

    granularities: ClassVar[tuple[str, ...]] = ("span",)
    looks_at: ClassVar[str] = ""
    """``"input"``: the timestep-modulated input of the first block. ``"first block"``: what the first block adds."""

    granularity: str = "span"
    interval: int = 5
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("threshold", self.threshold, 0)

    @abstractmethod
    def verdict(self, stream: Stream, change: float) -> str | None:
        """None when this step is forecast, else the reason why it is computed, given the change of what it looks at."""

    @abstractmethod
    def keep(self, stream: Stream, now: Tensor, computed: bool) -> None:
        """Take note of what was looked at."""
