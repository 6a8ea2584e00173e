"""Ranks of a pipeline as threads of one process."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from vdit_fast.parallel.hops import Counts

SECONDS = 60


class LocalRing:
    """One rank's end; ``LocalRing.of(n)`` makes n that belong together."""

    def __init__(self, rank: int, ranks: int, boxes: list[queue.Queue[Any]], failed: threading.Event) -> None:
        self.rank, self.ranks = rank, ranks
        self.sent, self.received = Counts(), Counts()
        self._boxes, self._failed = boxes, failed
        self._empty: Callable[[int], Tensor | None] = lambda index: None
        self._index = 0

    @classmethod
    def of(cls, ranks: int) -> list[LocalRing]:
        boxes: list[queue.Queue[Any]] = [queue.Queue() for _ in range(ranks)]
        failed = threading.Event()
        return [cls(rank, ranks, boxes, failed) for rank in range(ranks)]

    def begin(self) -> None:
        self.check()

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def share(self, value: Any, what: str) -> Any:
        if self.rank == 0:
            for box in self._boxes[1:]:
                box.put(copy.deepcopy(value))
            return value
        return self._boxes[self.rank].get(timeout=SECONDS)

    def open(self, empty: Callable[[int], Tensor | None]) -> None:
        self._empty = empty

    def room(self) -> None:
        self.check()

    def send(self, buffer: Tensor) -> None:
        self.sent.add(buffer)
        self._boxes[(self.rank + 1) % self.ranks].put(buffer.clone())

    def there(self) -> bool:
        return not self._boxes[self.rank].empty()

    def receive(self) -> Tensor | None:
        buffer = self._empty(self._index)
        if buffer is None:
            return None
        self._index += 1
        while True:
            try:
                got = self._boxes[self.rank].get(timeout=0.2)
                break
            except queue.Empty:
                self.check()
        if got is None:
            return None
        assert got.shape == buffer.shape and got.dtype == buffer.dtype
        self.received.add(got)
        return got

    def stop(self, sent: int, last: Tensor | None) -> None:
        self._boxes[(self.rank + 1) % self.ranks].put(None)

    def check(self) -> None:
        if self._failed.is_set():
            raise RuntimeError("another rank failed")

    def fail(self, error: BaseException) -> None:
        self._failed.set()

    def finish(self) -> None: ...
    def close(self) -> None: ...


def run_ranks(work: Callable[[LocalRing], Any], ranks: int) -> list[Any]:
    """What ``work`` returns on every rank; the first error of any is raised."""
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def target(ring: LocalRing) -> None:
        try:
            results[ring.rank] = work(ring)
        except BaseException as error:
            ring.fail(error)
            errors.append(error)

    threads = [threading.Thread(target=target, args=(ring,), daemon=True) for ring in LocalRing.of(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results
