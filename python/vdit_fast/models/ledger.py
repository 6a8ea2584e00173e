"""What happened in every served layer: calls, densities, times, reasons for running dense."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["LayerLedger", "Span", "stamp"]

_MAX_REASONS = 64
_MAX_PENDING = 256


def stamp(device: torch.device) -> Any:
    """A moment on the device's own clock: seconds on a CPU, an event on a GPU, None inside a CUDA-graph capture."""
    if device.type != "cuda":
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Span:
    """Sum of measured durations. GPU events are read when they are done, so that measuring never waits."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pending: list[tuple[Any, Any]] = []

    def add(self, start: Any, end: Any) -> None:
        """Add the time between two stamps of one device."""
        if start is None or end is None:
            return
        if isinstance(start, float):
            self._seconds += end - start
            return
        self._pending.append((start, end))
        if len(self._pending) > _MAX_PENDING:
            self._collect(wait=False)

    def _collect(self, wait: bool) -> None:
        left = []
        for start, end in self._pending:
            if wait:
                end.synchronize()
            if wait or end.query():
                self._seconds += start.elapsed_time(end) / 1000.0
            else:
                left.append((start, end))
        self._pending = left

    @property
    def seconds(self) -> float:
        """The sum so far; waits for GPU work that is still running."""
        self._collect(wait=True)
        return self._seconds


@dataclass
class LayerLedger:
    """One served layer's record."""

    name: str
    """Module path inside the transformer."""
    layer: int
    """Index among all served layers of the transformer."""
    place: int = 0
    """Index among those that planners see: the served layers before it with a video grid and softmax attention."""
    always_dense: str | None = None
    """Why no planner sees it, None when planners do."""
    own_linear: bool = False
    """Whether its attention is linear by the model's own design; ``always_dense`` says so too."""
    converted: bool = False
    """Whether the configuration made its attention linear: no planner sees it then."""
    calls: int = 0
    """Attention calls, recomputation under gradient checkpointing excluded."""
    sparse_calls: int = 0
    """Of them, those that left keys out."""
    plan_time: Span = field(default_factory=Span)
    attention_time: Span = field(default_factory=Span)
    dense: Counter[str] = field(default_factory=Counter)
    """Calls kept dense by the planner or for ``always_dense``, by reason."""
    unasked: Counter[str] = field(default_factory=Counter)
    """Calls whose keys somebody else had chosen, so that the planner was not asked, by reason."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Calls that could not be served as configured, by reason."""
    _density: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def planned(self) -> bool:
        """Whether planners see it."""
        return self.always_dense is None and not self.converted

    @property
    def linear(self) -> bool:
        """Whether it runs linear attention."""
        return self.own_linear or self.converted

    def fresh(self) -> LayerLedger:
        """An empty record of the same layer."""
        return LayerLedger(self.name, self.layer, self.place, self.always_dense, self.own_linear, self.converted)

    def count(self, kind: Counter[str], reason: str) -> None:
        """Count a reason; beyond a bound on different ones the rest counts as one."""
        kind[reason if reason in kind or len(kind) < _MAX_REASONS else "other reasons"] += 1

    def add_density(self, step: int, density: float | torch.Tensor) -> None:
        """Add one call's density, for all heads or [H]; a device tensor is summed on the device, without reading it."""
        total = self._density.setdefault(step, [0.0, 0])
        total[0] = total[0] + density
        total[1] += 1

    def density(self) -> dict[int, float]:
        """Mean density per step over calls, branches and generations; step -1 collects calls of an unknown step."""
        return {step: _mean(total) / calls for step, (total, calls) in sorted(self._density.items())}

    def head_density(self) -> list[float]:
        """Mean density of every head over all calls; one number when the heads never differed, [] before a call."""
        calls = sum(calls for _, calls in self._density.values())
        totals = [torch.as_tensor(total, dtype=torch.float64).cpu().view(-1) for total, _ in self._density.values()]
        return (torch.stack(torch.broadcast_tensors(*totals)).sum(0) / calls).tolist() if calls else []

    def mean_density(self) -> float | None:
        """Mean over all calls, None before the first."""
        calls = sum(calls for _, calls in self._density.values())
        return sum(_mean(total) for total, _ in self._density.values()) / calls if calls else None


def _mean(total: float | torch.Tensor) -> float:
    return float(total.mean()) if isinstance(total, torch.Tensor) else total
