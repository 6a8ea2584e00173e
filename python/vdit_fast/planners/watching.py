"""A planner around another one, for those that watch what it does."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext, StepContext
    from ..plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class Watching(Planner):
    """Has the name, the common knobs and the answers of `inner`; a subclass overrides `decision` to look at them."""

    inner: Planner

    def __post_init__(self) -> None:
        for knob in fields(Planner):
            self._set(knob.name, getattr(self.inner, knob.name))
        self._set("name", self.inner.name)  # on the object: as a class attribute it would enter the registry
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict()

    def decide(self, ctx: LayerContext) -> str | None:
        return self.inner.decide(ctx)

    def observes(self, step: StepContext) -> str | None:
        return self.inner.observes(step)

    @property
    def remembers(self) -> bool:
        return self.inner.remembers

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        return self.inner.plan(q, k, ctx)
