"""How much memory a run takes beyond what was there before it."""

from __future__ import annotations

import gc
import os
import threading
from types import TracebackType

import torch

INTERVAL = 0.005
"""Seconds between two looks at a CPU process."""


class PeakMemory:
    """Context manager; ``nbytes`` afterwards: the most memory in use, minus that at the beginning.

    On a GPU the allocator's own peak. On a CPU the resident set, looked at by a thread: allocations that come and go
    between two looks are missed, and pages that an earlier run left behind count as there before. None where the
    system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.nbytes: int | None = None
        self._device = device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        before = _resident()
        if before is not None:
            self._before = self._most = before
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._most = max(self._most, _resident() or 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.nbytes = max(self._most, _resident() or 0) - self._before


def _resident() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
