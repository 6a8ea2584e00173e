"""How the ranks of a pipeline reach each other: a ring of hops over torch.distributed."""

from __future__ import annotations

import datetime
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vdit_fast.parallel.hops import Counts, Incoming, Outgoing
from vdit_fast.parallel.members import keeper, kept_by_agent, ranks_store
from vdit_fast.parallel.watch import INTERVAL, Watch

__all__ = ["Alone", "Ring", "Transport"]

ENDED = "ended"
FOREVER = datetime.timedelta(days=7)
"""Timeout of the process groups. Waits are ended by the watch, which knows whether the others still live."""


class Transport(Protocol):
    """Rank r sends to rank r + 1 and the last one to the first."""

    rank: int
    ranks: int
    sent: Counts
    received: Counts

    def begin(self) -> None:
        """A run begins; ends with ``finish`` or ``fail``. Raises where a rank has failed since the run before."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """In it the caller's code runs, for as long as it likes: the others' waits do not count, and a failure of
        theirs is raised behind it."""
        ...

    def share(self, value: Any, what: str) -> Any:
        """The first rank's value, on every rank; tensors in it on the CPU."""
        ...

    def open(self, empty: Callable[[int], Tensor | None]) -> None:
        """Begin to receive; ``empty`` makes the buffer of message number k, None: there are no more."""
        ...

    def room(self) -> None:
        """Wait until a message may be sent."""
        ...

    def send(self, buffer: Tensor) -> None:
        """Send a message, after ``room``; the buffer must not be written to any more."""
        ...

    def there(self) -> bool:
        """Whether a message has come."""
        ...

    def receive(self) -> Tensor | None:
        """The next message; None: there are no more."""
        ...

    def stop(self, sent: int, last: Tensor | None) -> None:
        """No messages after number ``sent``: on the first rank by its own decision, on others because ``receive`` said
        so. ``last`` is any buffer that the next rank would receive."""
        ...

    def check(self) -> None:
        """Raise where another rank has failed."""
        ...

    def fail(self, error: BaseException) -> None:
        """This rank has failed; all others get to know."""
        ...

    def finish(self) -> None:
        """Wait until all messages have left and all ranks are done."""
        ...

    def close(self) -> None:
        """No further runs."""
        ...


class Alone:
    """One rank, which sends nothing."""

    rank, ranks = 0, 1

    def __init__(self) -> None:
        self.sent, self.received = Counts(), Counts()

    def share(self, value: Any, what: str) -> Any:
        return value

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self) -> None: ...
    def check(self) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...
    def stop(self, sent: int, last: Tensor | None) -> None: ...
    def open(self, empty: Callable[[int], Tensor | None]) -> None: ...

    def there(self) -> bool:
        return False

    def room(self) -> None:
        raise AssertionError("a single rank sends nothing")

    def send(self, buffer: Tensor) -> None:
        raise AssertionError("a single rank sends nothing")

    def receive(self) -> Tensor | None:
        return None


class Ring:
    """The hops between the ranks of a process group (NCCL, gloo).

    Every rank of the group must make one, in the same order where there are several of the same ranks.

    Args:
        group: None: all ranks.
        device: of the model.
        patience: seconds without a sign of life after which a rank counts as dead, once it has given its first.
        timeout: most seconds to wait for the others to come, and for one message; time that a rank is in the caller's
            code does not count.

    Raises:
        RankFailed: a rank has failed, or has not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        patience: float = 10.0,
        timeout: float = 600.0,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised; start with torchrun and call init_process_group")
        everybody = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self.rank, self.ranks = dist.get_rank(group), len(everybody)
        if self.ranks < 2:
            raise ValueError("group: it has one rank; a ring needs two")
        self.sent, self.received = Counts(), Counts()
        self._device = torch.device(device)
        shared = ranks_store(everybody, self.rank, patience, "the pipeline")
        self.watch = Watch(
            shared, self.rank, self.ranks, patience, timeout, keeper=keeper(everybody), agent=kept_by_agent()
        )
        weakref.finalize(self, self.watch.close).atexit = False  # then it closes by itself, in the right order
        self._host = dist.get_backend(group) != "nccl"
        self._groups: list[dist.ProcessGroup] = []
        try:
            self._all = self.watch.run(lambda: self._connect(everybody, shared), "the other ranks to connect")
        except BaseException as error:
            self.fail(error)
            raise
        self.watch.aside = True
        self._out: Outgoing | None = None
        self._in: Incoming | None = None

    def _connect(self, everybody: list[int], store: dist.Store) -> dist.ProcessGroup:
        # All ranks are in every group: torch names the groups of a part by how many groups a rank has had. Who has had
        # fewer makes some of its own, where some of these ranks had a ring before.
        count = len(dist.distributed_c10d._world.pg_names)
        store.set(f"groups/{self.rank}", str(count))
        keys = [f"groups/{other}" for other in range(self.ranks)]
        while not store.check(keys):  # store.wait would hold up the watch's signs of life
            self.watch.check()
            time.sleep(INTERVAL / 10)
        for _ in range(max(int(store.get(key)) for key in keys) - count):
            dist.new_group([everybody[self.rank]], use_local_synchronization=True)
        for _ in range(self.ranks):
            self._groups.append(dist.new_group(everybody, timeout=FOREVER, use_local_synchronization=True))
        return dist.new_group(everybody, timeout=FOREVER, use_local_synchronization=True)

    def begin(self) -> None:
        self._out = self._in = None
        self.watch.begin()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.watch.aside = True
        try:
            yield
        finally:
            self.watch.aside = False
        self.watch.check()

    def share(self, value: Any, what: str) -> Any:
        box = [value if self.rank == 0 else None]
        device = None if self._host else self._device
        self.watch.run(lambda: dist.broadcast_object_list(box, group_src=0, group=self._all, device=device), what)
        return box[0]

    def open(self, empty: Callable[[int], Tensor | None]) -> None:
        before, after = (self.rank - 1) % self.ranks, (self.rank + 1) % self.ranks
        self._out = Outgoing(self._groups[self.rank], after, self.watch, self._device, self._host)
        self._in = Incoming(
            self._groups[before], before, self.watch, self._device, self._host, empty, self._ended, self.rank != 0
        )
        self.sent, self.received = self._out.counts, self._in.counts

    def _ended(self, index: int) -> bool:
        count = self.watch.get(ENDED)
        return count is not None and int(count) == index

    def room(self) -> None:
        assert self._out is not None
        self._out.room()

    def send(self, buffer: Tensor) -> None:
        assert self._out is not None
        self._out.put(buffer)

    def there(self) -> bool:
        assert self._in is not None
        return self._in.there()

    def receive(self) -> Tensor | None:
        assert self._in is not None
        return self._in.get()

    def stop(self, sent: int, last: Tensor | None) -> None:
        if self.rank == 0:
            self.watch.set(ENDED, str(sent))
        if last is not None:
            assert self._out is not None
            self._out.room()
            self._out.put(last, counted=False)

    def check(self) -> None:
        self.watch.check()

    def fail(self, error: BaseException) -> None:
        self.watch.fail(error)
        self.watch.abandon()

    def finish(self) -> None:
        if self._out is not None:
            self._out.finish()
        self.watch.leave()
        self.watch.aside = True

    def close(self) -> None:
        self.watch.close()
