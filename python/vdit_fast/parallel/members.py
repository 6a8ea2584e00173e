"""The ranks that exchange rows, heads or branches in every forward, and the watch that ends all when one fails."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from vdit_fast.parallel.watch import CAUSE, INTERVAL, RankFailed, Watch, reach

__all__ = ["Members", "Shared", "keeper", "kept_by_agent", "ranks_store"]

Own = TypeVar("Own", bound="Shared")


def ranks_store(members: Sequence[int], rank: int, patience: float, of: str) -> dist.Store:
    """A connection of its own to the store of torch.distributed, for the keys of these ranks alone.

    Args:
        members: their numbers among all ranks; ``rank`` counts in them.
        of: what they make up. All ranks must ask in the same order where they ask several times for the same.

    Raises:
        RankFailed: the store cannot be reached within ``patience`` seconds.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    name = f"vdit_fast/{of}/{list(members)}"

    def connect() -> dist.Store:
        own = store.clone()
        number = own.add(f"{name}/made/{rank}", 1)  # of those that these ranks have made, the same on all
        return dist.PrefixStore(f"{name}/{number}", own)

    return reach(connect, patience, kept_by_agent())


def kept_by_agent() -> bool:
    """Whether the store of torch.distributed is that of the launcher's agent, a process that is no rank's."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    store: Any = dist.distributed_c10d._get_default_store()
    port = getattr(getattr(store, "_underlying_non_prefix_store", store), "port", None)
    return str(port) == os.environ.get("MASTER_PORT")  # a caller's own store has another one, or none


def keeper(members: Sequence[int]) -> int | None:
    """Which of these ranks is the one among all whose process keeps the store, None where it is none of them."""
    return members.index(0) if 0 in members and not kept_by_agent() else None


class Members:
    """The ranks of a process group that compute the same forwards together.

    Args:
        group: theirs.
        what: what they make up, for messages.
        patience: seconds without a sign of life after which a rank counts as dead.

    Raises:
        RankFailed: the store of torch.distributed cannot be reached.
    """

    def __init__(self, group: dist.ProcessGroup, what: str, patience: float) -> None:
        everybody = dist.get_process_group_ranks(group)
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), len(everybody)
        self.patience = patience
        of = what if self.ranks == dist.get_world_size() else f"{what} {everybody}"
        self._on_device = dist.get_backend(group) == "nccl"
        self._watch: Watch | None = None
        self._told = False
        if self.ranks > 1:
            store = ranks_store(everybody, self.rank, patience, of)
            # No call of this class sits where it does not see a failure, but NCCL's do.
            self._watch = Watch(
                store,
                self.rank,
                self.ranks,
                patience,
                end_process=self._on_device,
                closing_fails=False,
                of=of,
                keeper=keeper(everybody),
                agent=kept_by_agent(),
            )
            self._watch.aside = True
            weakref.finalize(self, self._watch.close).atexit = False  # then it closes by itself, in the right order

    def run(self, collective: Callable[[bool], Any]) -> None:
        """Run a collective, which is called with whether it is to be asynchronous, and wait for it where it has
        results on the host.

        Raises:
            RankFailed: a rank has failed, or has ended what it shares with the others.
        """
        watch = self._watch
        if watch is None:
            collective(False)
            return
        if self._on_device:  # the host does not wait here
            watch.check()
            collective(False)
            return
        work, began = collective(True), time.monotonic()
        while True:
            try:
                work.wait(timedelta(seconds=INTERVAL))
                return
            except RuntimeError:
                if work.is_completed():  # what it says now: it may have ended well after the wait had timed out
                    try:
                        work.wait()
                        return
                    except RuntimeError as error:
                        self._explain(watch, error)
            watch.check()
            if watch.closed and time.monotonic() - began > CAUSE:  # what was sent before may be under way
                raise self._gone(watch)

    def _explain(self, watch: Watch, error: RuntimeError) -> NoReturn:
        """A connection has broken: whose end it was shows within the patience."""
        until = time.monotonic() + self.patience + CAUSE
        while time.monotonic() < until:
            watch.check()
            if watch.closed:
                raise self._gone(watch) from error
            if watch.store_gone is not None:
                raise watch.unexplained(error) from error
            time.sleep(INTERVAL / 5)
        raise error  # all live: the connection's own fault

    def _gone(self, watch: Watch) -> RankFailed:
        return watch.lost(min(watch.closed), "it has ended its part, or its process is over; its own output says why")

    def inside(self, forward: bool) -> None:
        """Whether this rank is in a forward, where it may sit in a call of NCCL that does not return."""
        if self._watch is not None:
            self._watch.aside = not forward

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error: the others get to know, with its traceback."""
        self.inside(False)
        if self._watch is not None and not self._told:
            self._told = True
            self._watch.fail(error)
            self._watch.abandon()

    def close(self) -> None:
        """This rank exchanges nothing any more."""
        if self._watch is not None:
            self._watch.close()


class Shared:
    """What the members compute together until it is called, or left as a context manager: the others hear of an error
    there before it ends."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.group = members.group
        self.rank, self.ranks = members.rank, members.ranks

    def __call__(self) -> None:
        """This rank exchanges nothing any more. Safe to call again."""
        self.members.close()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.members.failed(error)
        self()
