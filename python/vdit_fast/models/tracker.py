"""Derives the denoising step from what a transformer is called with, unless the caller names it.

The order of sources, best first; none of them counts calls:

1. The ``timestep`` argument is a view into ``scheduler.timesteps``: its storage offset is the step. No host read.
2. The pipeline's ``current_timestep`` is such a view while the argument was cast or made per token. No host read on
   a GPU; on a CPU the values must agree.
3. The value, read on the host (counted in ``host_reads``), is found in the scheduler's timesteps after rounding them
   to the argument's dtype; ``scheduler.step_index`` decides between equal ones (bf16 merges neighbours).
4. Without a schedule that contains the value: lower than the last is the next step, the same is the next branch of
   the same step, higher is a new generation.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vdit_fast.context import StepContext
from vdit_fast.models.explicit import ExplicitStep

__all__ = ["StepTracker"]


class _Schedule:
    """Host copy of one ``scheduler.timesteps``. Holding the original keeps its identity unambiguous."""

    def __init__(self, source: Any, sigmas: Any) -> None:
        self.source = source
        self.tensor = source.detach() if isinstance(source, torch.Tensor) else torch.as_tensor(source)
        self.values = [float(item) for item in self.tensor.reshape(-1).tolist()]
        self.sigmas: list[float] | None = None
        self.device_reads = int(self.tensor.device.type != "cpu")
        if isinstance(sigmas, torch.Tensor) and sigmas.ndim == 1 and len(sigmas) >= len(self.values):
            self.device_reads += int(sigmas.device.type != "cpu")
            read = [float(item) for item in sigmas.detach()[: len(self.values)].tolist()]
            # Schedulers of the EDM family count sigma from 0 to 80: not a fraction of noise.
            if all(0.0 <= item <= 1.0 for item in read):
                self.sigmas = read

    def position(self, view: Any) -> int | None:
        """Index of a tensor that is a view of one entry of the schedule, else None."""
        own = self.tensor
        if type(view) is not torch.Tensor or view.numel() == 0 or view.device.type == "meta":
            return None
        if view.dtype != own.dtype or view.device != own.device or own.ndim != 1:
            return None
        if any(size != 1 and stride != 0 for size, stride in zip(view.shape, view.stride(), strict=True)):
            return None
        if view.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        step, rest = divmod(int(view.storage_offset()) - int(own.storage_offset()), max(own.stride(0), 1))
        return step if rest == 0 and 0 <= step < len(self.values) else None

    def rounded(self, dtype: torch.dtype | None) -> list[float]:
        if dtype is None:
            return self.values
        return [float(item) for item in torch.tensor(self.values, dtype=torch.float64).to(dtype).double().tolist()]


class StepTracker:
    """One denoising run's progress, shared by all transformers of a pipeline (both experts of Wan 2.2).

    Args:
        pipe: the pipeline, referenced weakly and read at every forward for its ``scheduler`` and
            ``current_timestep``; None when a transformer is used alone.

    ``host_reads`` counts reads of device memory: at most one per forward (none when the timestep can be traced back
    to the schedule) plus at most two per schedule.
    """

    def __init__(self, pipe: Any = None) -> None:
        self._pipe: Callable[[], Any] = lambda: None
        if pipe is not None:
            try:
                self._pipe = weakref.ref(pipe)
            except TypeError:  # an object without weak references: keep it
                self._pipe = lambda: pipe
        self.host_reads = 0
        self.context = StepContext()
        self.explicit: ExplicitStep | None = None
        """The step that the caller names, None where it is derived."""
        self.calls_per_branch = False
        """Whether pipelines of this family call the transformer once for every guidance branch."""
        self._schedule: _Schedule | None = None
        self._forget()

    def _forget(self) -> None:
        self._started = False
        self._named = False  # the run's steps are named by the caller
        self._index: int | None = None  # of the last forward in its schedule
        self._value = 0.0
        self._distinct = 0  # steps seen since the generation began, for schedules nobody knows
        self._branches = 1  # most branches seen since the generation began

    @property
    def pipe(self) -> Any:
        """The pipeline, or None when there is none or it is gone."""
        return self._pipe()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTracker:
        pipe = self.pipe
        new = StepTracker(memo.get(id(pipe)) if pipe is not None else None)
        new.calls_per_branch = self.calls_per_branch
        memo[id(self)] = new
        return new

    def reset(self) -> None:
        """Forget the run: the next forward begins a new generation."""
        if self._started or self._named:
            self.context = StepContext(generation=self.context.generation + 1)
        self._forget()

    def observe(self, timestep: Any, expert: str = "transformer") -> StepContext:
        """The context of a forward that is about to run.

        Args:
            timestep: the transformer's argument: a tensor of any shape and dtype (the largest value counts), a number,
                or None (the step stays -1).
            expert: the name of the transformer inside the pipeline.
        """
        if self.explicit is not None:
            if self._started:
                self.reset()
            self._named = True
            self.context = self.explicit.context(expert, self.context.generation)
            return self.context
        if self._named:
            self.reset()
        schedule, changed = self._read_schedule()
        if changed:
            self.reset()
        num_steps = len(schedule.values) if schedule is not None else None
        value, index = self._locate(timestep, schedule)
        if value is None:
            self.context = replace(
                self.context, step=-1, num_steps=num_steps, timestep=None, sigma=None, branch=0, expert=expert
            )
            return self.context
        # Progress grows towards the clean video: the schedule's index when both forwards have one, else less noise.
        known = index is not None and self._index is not None
        progress = float(index - self._index) if known else self._value - value  # type: ignore[operator]
        branch = 0
        if self._started and progress < 0:
            self.reset()
        elif self._started and progress == 0:
            branch = self.context.branch + 1
        elif self._started:
            self._distinct += 1
        self._started, self._index, self._value = True, index, value
        guided = self.calls_per_branch and getattr(self.pipe, "do_classifier_free_guidance", False) is True
        self._branches = max(self._branches, branch + 1, 2 if guided else 1)
        sigma = value / 1000.0
        if schedule is not None and schedule.sigmas is not None and index is not None:
            sigma = schedule.sigmas[index]
        self.context = StepContext(
            step=self._distinct if index is None else index,
            num_steps=num_steps,
            timestep=value,
            sigma=sigma if 0.0 <= sigma <= 1.0 else None,
            branch=branch,
            branches=self._branches,
            expert=expert,
            generation=self.context.generation,
        )
        return self.context

    def _read_schedule(self) -> tuple[_Schedule | None, bool]:
        """The current schedule, and whether it is another one than at the last forward."""
        scheduler = getattr(self.pipe, "scheduler", None)
        source = getattr(scheduler, "timesteps", None)
        if source is None or len(source) == 0:
            self._schedule = None
            return None, False
        known = self._schedule
        if known is not None and known.source is source:
            return known, False
        self._schedule = _Schedule(source, getattr(scheduler, "sigmas", None))
        self.host_reads += self._schedule.device_reads
        return self._schedule, known is not None

    def _locate(self, timestep: Any, schedule: _Schedule | None) -> tuple[float | None, int | None]:
        """(value, index in the schedule) of a timestep argument; either may be unknown."""
        if timestep is None:
            return None, None
        if not isinstance(timestep, torch.Tensor):
            value = float(timestep)
            return self._match(value, None, schedule) if math.isfinite(value) else (None, None)
        if timestep.numel() == 0 or timestep.device.type == "meta":
            return None, None
        hinted: int | None = None
        if schedule is not None:
            index = schedule.position(timestep)
            if index is not None:
                return schedule.values[index], index
            hinted = schedule.position(getattr(self.pipe, "current_timestep", None))
            if hinted is not None and timestep.device.type != "cpu":
                return schedule.values[hinted], hinted
        self.host_reads += int(timestep.device.type != "cpu")
        value = float(timestep.detach().max())
        if not math.isfinite(value):
            return None, None
        if schedule is not None and hinted is not None and schedule.rounded(timestep.dtype)[hinted] == value:
            return schedule.values[hinted], hinted
        return self._match(value, timestep.dtype, schedule)

    def _match(self, value: float, dtype: torch.dtype | None, schedule: _Schedule | None) -> tuple[float, int | None]:
        if schedule is None:
            return value, None
        found = [index for index, item in enumerate(schedule.rounded(dtype)) if item == value]
        if not found:
            return value, None
        index = found[0]
        if len(found) > 1:
            hint = getattr(getattr(self.pipe, "scheduler", None), "step_index", None)
            if hint in found:
                index = hint
            elif self._index in found:
                index = self._index
        return schedule.values[index], index
