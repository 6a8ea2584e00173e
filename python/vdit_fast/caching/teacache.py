"""TeaCache: steps are forecast until the changes of the timestep-modulated input have added up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .adaptive import AdaptivePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from .stream import Stream


@dataclass(frozen=True, kw_only=True)
class TeaCache(AdaptivePolicy):
    """TeaCache (Liu et al., arXiv 2411.19108).

    The relative change of the first block's modulated input from step to step, rescaled by a polynomial that was fitted
    for the model, estimates the change of the output. A step is computed when the estimates since the last computed one
    add up to ``threshold``; until then what all blocks added there is added again.

    Knobs besides those of ``AdaptivePolicy``:
        coefficients: of the polynomial, highest power first, as published for a model; None: the change itself.
    """

    name: ClassVar[str] = "teacache"
    looks_at: ClassVar[str] = "input"

    coefficients: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients is None:
            return
        found = tuple(self.coefficients) if isinstance(self.coefficients, list | tuple) else ()
        numbers = [item for item in found if isinstance(item, int | float) and not isinstance(item, bool)]
        if not found or len(numbers) < len(found) or not all(math.isfinite(item) for item in numbers):
            raise TypeError(f"coefficients must be finite numbers, highest power first, got {self.coefficients!r}")
        object.__setattr__(self, "coefficients", found)

    def rescaled(self, change: float) -> float:
        """The estimated change of the output."""
        total = 0.0
        for factor in self.coefficients or (1.0, 0.0):
            total = total * change + factor
        return total

    def verdict(self, stream: Stream, change: float) -> str | None:
        stream.change += self.rescaled(change)
        small = stream.change < self.threshold  # false for NaN
        return None if small else f"changes of the modulated input add up to {self.threshold:g} or more"

    def keep(self, stream: Stream, now: Tensor, computed: bool) -> None:
        stream.seen = now
        if computed:
            stream.change = 0.0
