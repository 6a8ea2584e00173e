"""The row policy base: which steps compute every video token, and which tokens the other steps compute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import methods

if TYPE_CHECKING:
    from ..context import StepContext

REGISTRY: dict[str, type[RowPolicy]] = {}
"""Every policy class by its ``name``; a subclass with a name enters it when it is defined."""


@dataclass(frozen=True, kw_only=True)
class RowPolicy(ABC):
    """Decides per step which video tokens the transformer computes; the others keep their last output.

    A policy is an immutable bag of settings; what it has seen of a generation is handed to it.

    Common knobs:
        kv_budget_gib: most memory, in GiB, that the kept keys and values of one transformer may take, all guidance
            branches together. More is refused before anything is allocated, with the number. None: no limit.

    Raises:
        TypeError, ValueError: a knob has a wrong type or value; the message names it.
    """

    name: ClassVar[str] = ""

    kv_budget_gib: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        methods.enter(REGISTRY, cls, "row policy")

    def __post_init__(self) -> None:
        budget = self.kv_budget_gib
        if budget is None:
            return
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"kv_budget_gib must be a number of GiB or null, got {budget!r}")
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"kv_budget_gib must be positive and finite, or null for no limit, got {budget!r}")

    @abstractmethod
    def whole(self, step: StepContext) -> str | None:
        """Why this step computes every token (one line for the report), or None."""

    @abstractmethod
    def keeps(self, step: StepContext) -> bool:
        """Whether a step that computes every token must keep its keys, values and output for the steps after it."""

    @abstractmethod
    def active(self, tokens: int) -> int:
        """Number of tokens, of ``tokens``, that the other steps compute: 1 to ``tokens``. It costs no device read."""

    @abstractmethod
    def measure(self, output: Tensor) -> Tensor:
        """What the choice is made by: fp32 [N], from the model's output per token [B, N, patch, channels]."""

    @abstractmethod
    def choose(self, measure: Tensor, skipped: Tensor) -> Tensor:
        """The tokens to compute, ascending: int32 [active], on the device and without reading it.

        Args:
            measure: fp32 [N].
            skipped: fp32 [N], how often each token was left out in this generation.
        """

    def to_dict(self) -> dict[str, Any]:
        """{"method": name, knob: value, ...} in plain JSON/YAML types; ``from_dict`` reads it back."""
        return methods.to_mapping(self)


def from_dict(data: Mapping[str, Any]) -> RowPolicy:
    """Build a policy from {"method": name, knob: value, ...}; raises what ``methods.build`` raises."""
    return methods.build(REGISTRY, data, "row policy", '{"method": "ras", "sample_ratio": 0.5}')
