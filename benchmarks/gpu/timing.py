"""Times calls against each other: in turn, in one process, several launches per sample, medians over samples."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How often each call runs. A sample is at least ``launches`` calls and at least ``sample_ms`` long."""

    warmups: int = 3
    launches: int = 10
    samples: int = 5
    sample_ms: float = 20.0
    most_launches: int = 200

    def calls(self, milliseconds: float) -> int:
        """Calls per sample for a call that takes this long."""
        wanted = math.ceil(self.sample_ms / max(milliseconds, 1e-3))
        return min(max(self.launches, wanted), max(self.launches, self.most_launches))

    def total(self, milliseconds: float) -> float:
        """Milliseconds of all calls of one contender."""
        return (self.warmups + 1 + self.samples * self.calls(milliseconds)) * milliseconds


FULL = Effort()
QUICK = Effort(warmups=1, launches=2, samples=3, sample_ms=0.0)


def sample(call: Call, launches: int, device: str) -> float:
    """Milliseconds per call."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / launches
    start = time.perf_counter()
    for _ in range(launches):
        call()
    return (time.perf_counter() - start) * 1e3 / launches


def interleaved(calls: Mapping[str, Call], effort: Effort, device: str) -> dict[str, list[float]]:
    """Milliseconds per call of each contender, one number per sample.

    The contenders take turns and the first one changes from round to round, so that heat and clocks hit all alike.
    """
    launches = {}
    for name, call in calls.items():
        for _ in range(effort.warmups):
            call()
        launches[name] = effort.calls(sample(call, 1, device))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(effort.samples):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(sample(calls[name], launches[name], device))
    return times


def summary(series: list[float]) -> dict[str, Any]:
    return {"ms": statistics.median(series), "ms_min": min(series), "ms_max": max(series), "samples": series}


def ratio(base: list[float], series: list[float]) -> dict[str, float]:
    """How many times faster ``series`` is than ``base``: median, minimum and maximum of the rounds' own ratios."""
    ratios = [b / t for b, t in zip(base, series, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def peak_bytes(call: Call, device: str) -> int | None:
    """Memory that a call takes besides what is there before it."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
