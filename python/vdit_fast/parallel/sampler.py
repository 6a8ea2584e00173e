"""How frame blocks are denoised, each with the state of its own schedule."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vdit_fast.parallel.identity import digest

__all__ = ["BlockSampler", "SchedulerSampler"]

Convert = Callable[[Tensor, Tensor, int], Tensor]
"""(prediction, latents, step) -> what the scheduler takes."""


class BlockSampler(Protocol):
    """A denoising schedule for many blocks that are at different steps of it. A ``description`` (str) tells a
    checkpoint whether it is of the same schedule."""

    @property
    def timesteps(self) -> list[float]:
        """What the transformer gets at each step."""
        ...

    def fresh(self) -> Any:
        """State of a block that has all steps before it."""
        ...

    def step(self, state: Any, prediction: Tensor, latents: Tensor, step: int) -> Tensor:
        """The latents after a step. Both tensors fp32 [1, C, F, H, W]; ``prediction`` is the transformer's output after
        guidance. ``state`` may change."""
        ...

    def save(self, state: Any) -> dict[str, Any]:
        """The state as tensors, numbers, strings and lists and dicts of them."""
        ...

    def load(self, saved: dict[str, Any]) -> Any:
        """Undoes ``save``."""
        ...


class SchedulerSampler:
    """A diffusers scheduler, copied for every block: multistep schedulers (UniPC, DPM++) remember each block's steps.

    Args:
        scheduler: with its timesteps set. It must be deterministic: noise that is drawn in a step could not be repeated
            from a checkpoint.
        convert: makes of the prediction what the scheduler takes; None: it takes the prediction.
        last: (prediction, what the scheduler made) -> the finished latents; None: what the scheduler made.

    Raises:
        ValueError: no timesteps are set.
    """

    def __init__(
        self,
        scheduler: Any,
        convert: Convert | None = None,
        last: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise ValueError("scheduler: it has no timesteps; call its set_timesteps first")
        self._scheduler = copy.deepcopy(scheduler)
        self._convert = convert
        self._last = last
        self._timesteps = [float(t) for t in timesteps]

    @property
    def timesteps(self) -> list[float]:
        return self._timesteps

    @property
    def description(self) -> str:
        """The scheduler's class and a digest of its configuration; the names of the functions around it."""
        config = dict(getattr(self._scheduler, "config", None) or {})
        own = {key: item for key, item in config.items() if not key.startswith("_")}
        around = [getattr(f, "__qualname__", type(f).__qualname__) for f in (self._convert, self._last)]
        return f"{type(self._scheduler).__name__} {digest([own, around])}"

    def fresh(self) -> Any:
        state = copy.deepcopy(self._scheduler)
        if hasattr(state, "set_begin_index"):
            state.set_begin_index(0)
        return state

    def step(self, state: Any, prediction: Tensor, latents: Tensor, step: int) -> Tensor:
        output = prediction if self._convert is None else self._convert(prediction, latents, step)
        new: Tensor = state.step(output, state.timesteps[step], latents, return_dict=False)[0]
        if self._last is not None and step == len(self._timesteps) - 1:
            new = self._last(prediction, new)
        return new

    def save(self, state: Any) -> dict[str, Any]:
        """As in ``BlockSampler``.

        Raises:
            ValueError: the steps have changed something in the scheduler that cannot be kept.
        """
        fresh = vars(self.fresh())
        saved = {name: copy.deepcopy(value) for name, value in vars(state).items() if _plain(value)}
        for name, value in vars(state).items():
            if name not in saved and (name not in fresh or not _same(value, fresh[name])):
                raise ValueError(
                    f"scheduler: {type(state).__name__}.{name} changes in its steps and is a {type(value).__name__}, "
                    "which a checkpoint cannot keep; run without checkpoints, or take another scheduler"
                )
        return saved

    def load(self, saved: dict[str, Any]) -> Any:
        state = self.fresh()
        vars(state).update(copy.deepcopy(saved))
        return state


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    if type(value) is dict:
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    return value is None or type(value) in (Tensor, bool, int, float, str)


def _same(a: Any, b: Any) -> bool:
    """Whether a copy still has what its original has."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if getattr(a, "__dict__", None):
        return _same(vars(a), vars(b))
    return bool(a == b)
