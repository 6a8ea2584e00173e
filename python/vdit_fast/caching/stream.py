"""What a feature cache remembers: factors of one feature, and the streams that keep them apart."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..reference.cache import E4M3
from .arithmetic import factor_update, forecast, forecast_gate_add

__all__ = ["Factors", "Stream"]


class Factors:
    """One cached feature: its last value F_0 and the differences F_1 ... F_order that forecasts need.

    Args:
        shape: of the feature.
        order: highest difference.
        dtype: in which factors are kept; in float8_e4m3fn a fp32 scale per row of the last dimension is kept as well.
        device: where they are used.
        offload: keep them in CPU memory between uses, pinned where the device is a GPU.
    """

    def __init__(
        self, shape: Sequence[int], order: int, dtype: torch.dtype, device: torch.device, offload: bool = False
    ) -> None:
        self.step = -1
        """Step of the last computed value."""
        self.known = 0
        """Number of factors that hold something."""
        self._device = device
        self._away = offload and device.type != "cpu"
        self._pinned = self._away and device.type == "cuda"
        place = torch.device("cpu") if self._away else device
        parts = [((order + 1, *shape), dtype)]
        if dtype == E4M3:
            parts.append(((order + 1, *shape[:-1]), torch.float32))
        with torch.inference_mode(False):  # an inference tensor could not be updated outside of inference mode
            self._kept = [torch.empty(size, dtype=kind, device=place, pin_memory=self._pinned) for size, kind in parts]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.numel() * part.element_size() for part in self._kept)

    def here(self) -> tuple[Tensor, Tensor | None]:
        """The factors ``[order + 1, *shape]`` and their scales, if they have any, on the device that uses them."""
        # Transfers are queued behind each other on the device's stream: nothing waits on the host.
        found = [part.to(self._device, non_blocking=self._pinned) if self._away else part for part in self._kept]
        return found[0], found[1] if len(found) > 1 else None

    def update(self, step: int, output: Tensor, minus: Tensor | None = None) -> None:
        """Take note of the feature computed at ``step``, or of the offset ``output - minus``. A step that is not later
        than the last one begins anew."""
        known = self.known if step > self.step else 0
        factors, scales = self.here()
        self.known = factor_update(factors, output, step - self.step, known=known, minus=minus, scales=scales)
        self.step = step
        if self._away:
            for kept, new in zip(self._kept, (factors, scales), strict=False):
                assert new is not None
                kept.copy_(new, non_blocking=self._pinned)

    def forecast(self, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
        """The feature in ``dtype``: the sum of the factors under ``weights``."""
        factors, scales = self.here()
        return forecast(factors, weights=weights, dtype=dtype, scales=scales)

    def added_to(self, x: Tensor, weights: Sequence[float]) -> Tensor:
        """x plus the feature, a new tensor in x's dtype."""
        factors, scales = self.here()
        return forecast_gate_add(x, [factors], [None], weights=weights, scales=[scales])


@dataclass
class Stream:
    """What is remembered of one guidance branch (and frame block) of one transformer in one generation."""

    first: int = -1
    """Step of the first computed forward, -1 before it."""
    step: int = -1
    """Step of the last computed forward, -1 before the first."""
    factors: dict[Hashable, Factors] = field(default_factory=dict)
    """By feature; what a feature is depends on the granularity."""
    form: Any = None
    """Of a transformer's output: how parts are wrapped, and their dtypes; None before the first, and at other
    granularities."""
    seen: Tensor | None = None
    """What an adaptive policy compares with."""
    granted: bool = False
    """Whether its factors were found to fit the budget."""
    change: float = 0.0
    """What an adaptive policy has added up."""

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors."""
        return sum(factors.nbytes for factors in self.factors.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        seen = self.seen.numel() * self.seen.element_size() if self.seen is not None else 0
        return seen + self.factor_bytes

    def begin(self, step: int) -> None:
        """A forward is computed at this step."""
        if self.first < 0 or step <= self.step:  # the same step again: an inner loop, which starts its history anew
            self.first = step
        self.step = step
