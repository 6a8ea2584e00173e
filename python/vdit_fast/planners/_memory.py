"""What a planner keeps in `ctx.state` between calls: under which key, for which layout, for how many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ..context import LayerContext
    from .base import Planner


def slot(word: str, planner: Planner, ctx: LayerContext) -> tuple[Any, ...]:
    """The key of what is kept per layer, guidance branch, expert and frame block; `word` names the method."""
    step = ctx.step
    return word, planner, ctx.layer, step.branch, step.expert, step.frame_block


def layout(q: Tensor, ctx: LayerContext) -> tuple[Any, ...]:
    """What must not have changed for a kept value to be used again."""
    return ctx.step.generation, tuple(ctx.grid), ctx.text, ctx.text_first, q.shape[0], q.shape[2], q.device


def choice(
    word: str, planner: Planner, q: Tensor, ctx: LayerContext, refresh: int, choose: Callable[[], Tensor]
) -> Tensor:
    """The kept choice, or a new one: at the first call, when the layout has changed, and every `refresh` steps.

    0: once per generation. 1: at every call, also while the step is unknown.
    """
    if refresh == 1:
        return choose()
    key, same, step = slot(word, planner, ctx), layout(q, ctx), ctx.step.step
    known = ctx.state.get(key)
    if known is None or known[0] != same or (refresh and step - known[1] >= refresh):
        known = ctx.state[key] = (same, step, choose())
    chosen: Tensor = known[2]
    return chosen
