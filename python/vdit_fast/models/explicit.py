"""A denoising step that the caller names, for sampling loops of one's own."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from numbers import Integral, Real
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vdit_fast.context import StepContext

if TYPE_CHECKING:
    from vdit_fast.models.tracker import StepTracker

__all__ = ["ExplicitStep"]


class ExplicitStep:
    """See ``Handle.step``. In force inside its ``with`` block."""

    def __init__(
        self,
        tracker: StepTracker,
        step_id: int | None,
        timestep: float | None,
        sigma: float | None,
        branch: int | None,
        model: str | None,
        num_steps: int | None,
        frame_block: int | None = None,
    ) -> None:
        _whole("step_id", step_id, 0)
        _whole("branch", branch, 0)
        _whole("num_steps", num_steps, 1)
        _whole("frame_block", frame_block, 0)
        _number("timestep", timestep)
        _number("sigma", sigma)
        if step_id is not None and num_steps is not None and step_id >= num_steps:
            raise ValueError(f"step_id must be below num_steps, got {step_id} of {num_steps}")
        if sigma is not None and not 0 <= sigma <= 1:
            raise ValueError(f"sigma must be a noise level in [0, 1], got {sigma}")
        if model is not None and (not isinstance(model, str) or not model):
            raise TypeError(f"model must be the name of what computes this step, got {model!r}")
        if sigma is None and timestep is not None and 0 <= timestep <= 1000:
            sigma = timestep / 1000.0
        self._tracker = tracker
        self._branch = branch
        self._model = model
        self._context = StepContext(
            step=-1 if step_id is None else step_id,
            num_steps=num_steps,
            timestep=timestep,
            sigma=sigma,
            frame_block=frame_block,
        )
        self._forwards: Counter[str] = Counter()

    def context(self, expert: str, generation: int) -> StepContext:
        """Of the next forward of a transformer."""
        branch = self._forwards[expert] if self._branch is None else self._branch
        self._forwards[expert] += 1
        return replace(
            self._context, branch=branch, branches=branch + 1, expert=self._model or expert, generation=generation
        )

    def __enter__(self) -> ExplicitStep:
        if self._tracker.explicit is not None:
            raise RuntimeError("step: another step of this handle is in force; end its 'with' block first")
        self._forwards.clear()
        self._tracker.explicit = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.explicit = None


def _whole(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {least} or None, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number (of a tensor: .item()) or None, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
