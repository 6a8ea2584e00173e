"""Ends every rank when one fails: heartbeats and an abort flag in the store, looked at by a thread of each rank.

The thread lives as long as the ring, between runs as well. Time that a rank spends in the caller's code is nobody's
wait: its signs of life say so, and nothing ends its process there.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from vdit_fast.parallel.at_exit import close_at_exit

__all__ = ["RankFailed", "Watch", "reach"]

INTERVAL = 0.25
"""Seconds between looks at the store."""
CAUSE = 3.0
"""Seconds for which a broken connection waits for the one at its other end to say what happened."""
GRACE = 8.0
"""Seconds after which a rank that knows of a failure, but sits in a call that does not return, is ended."""

CLOSED, ASIDE = "closed", " aside"

KEEPER = "all ranks, the process that keeps the store,"
"""Whose rank 0 it is, where that need not be one of the ranks under watch."""
AGENT = "the launcher's agent, whose process keeps the store and is no rank's,"
"""Under torch's launcher."""

Result = TypeVar("Result")


class RankFailed(RuntimeError):
    """A rank of a pipeline or group has failed; all others end with this error.

    Attributes:
        rank: which one, counted in the pipeline or group; 0 where only the process that keeps the store is known, -1
            where that is no rank's but the launcher's agent.
        reason: its own error with the traceback where there is one, else how it was noticed.
    """

    def __init__(self, rank: int, reason: str, of: str = "the pipeline") -> None:
        super().__init__(f"{f'rank {rank} of ' if rank >= 0 else ''}{of} failed: {reason}")
        self.rank = rank
        self.reason = reason


def _host_failed(reason: str, agent: bool) -> RankFailed:
    """That of the process that keeps the store."""
    return RankFailed(-1, reason, AGENT) if agent else RankFailed(0, reason, KEEPER)


def reach(call: Callable[[], Result], seconds: float, agent: bool = False) -> Result:
    """Run something that needs the store. It runs in a thread: connecting to a store whose process is gone goes on for
    the store's own timeout.

    Raises:
        RankFailed: that of the process that keeps the store: the launcher's agent, or else the first rank's.
    """
    answer: list[Result] = []
    why = [f"no answer within {seconds:g} s"]

    def target() -> None:
        try:
            answer.append(call())
        except Exception as error:
            why[0] = _first_line(error)

    thread = threading.Thread(target=target, name="vdit_fast store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise _host_failed(f"the store cannot be reached: {why[0]}", agent)
    return answer[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Watch:
    """One rank's eye on the others, until ``close`` or the first failure.

    Args:
        store: a torch.distributed store of the ranks; this object's own connection.
        patience: seconds without a sign of life after which a rank counts as dead, once it has given its first.
        timeout: most seconds to wait for a rank's first sign of life, and for anything a living rank should do; the
            time that a rank is in the caller's code does not count.
        end_process: end the process where a failure is known and the main thread does not come back to hear of it,
            unless it is in the caller's code.
        closing_fails: a rank that closes has failed, and so has the whole where the store is gone; otherwise who has
            closed is noted in ``closed``, and without the store nobody hears of the others until connections break.
        of: what the ranks make up, for messages.
        keeper: which of the ranks keeps the store in its process, None where it is none of them.
        agent: whether the launcher's agent keeps it.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: int,
        patience: float = 10.0,
        timeout: float = 600.0,
        end_process: bool = True,
        closing_fails: bool = True,
        of: str = "the pipeline",
        keeper: int | None = 0,
        agent: bool = False,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.patience, self.timeout, self.end_process = patience, timeout, end_process
        self.failure: RankFailed | None = None
        self.aside = False
        """The main thread is in the caller's code."""
        self.closed: set[int] = set()
        """Ranks that have closed, where that is no failure."""
        self.store_gone: str | None = None
        """Why nothing is heard of the others any more."""
        self.of = of
        self._keeper, self._agent = keeper, agent
        self._closing_fails = closing_fails
        self._store = store
        self._run = 0
        self._others_aside: set[int] = set()
        self._broken: tuple[float, RankFailed] | None = None
        self._heard = False  # the main thread knows
        self._left = threading.Event()
        self._seen = {other: ("", time.monotonic()) for other in range(ranks) if other != rank}
        self._thread = threading.Thread(target=self._look, name="vdit_fast watch", daemon=True)
        self._thread.start()
        close_at_exit(self)

    # ------------------------------------------------------------------ what the main thread calls
    def begin(self) -> None:
        """A run begins: its keys are others than those of the run before."""
        self._run += 1
        self.aside = False
        self.check()

    def check(self) -> None:
        """Raise where a rank has failed."""
        failure = self.failure
        if failure is None and self._broken is not None and time.monotonic() - self._broken[0] > CAUSE:
            failure = self._publish(self._broken[1])
        if failure is not None:
            self._heard = True
            raise failure

    def wait(self, done: Callable[[float], Result | None], for_rank: int, what: str) -> Result:
        """What ``done(seconds)`` returns once that is not None; it is called again and again.

        Raises:
            RankFailed: a rank has failed, or nothing has come within the timeout.
        """
        until = time.monotonic() + self.timeout
        while True:
            result = done(INTERVAL)
            if result is not None:
                return result
            self.check()
            if self._others_aside:
                until = time.monotonic() + self.timeout
            elif time.monotonic() > until:
                raise self.lost(for_rank, f"rank {self.rank} waited {self.timeout:g} s for {what} in vain")

    def run(self, call: Callable[[], Result], what: str) -> Result:
        """Run something that waits for other ranks, in a thread of its own."""
        answer: list[tuple[Result | None, BaseException | None]] = []
        ended = threading.Event()

        def target() -> None:
            try:
                answer.append((call(), None))
            except BaseException as error:
                answer.append((None, error))
            ended.set()

        threading.Thread(target=target, name=f"vdit_fast {what}", daemon=True).start()
        self.wait(lambda seconds: ended.wait(seconds) or None, (self.rank + 1) % self.ranks, what)
        result, error = answer[0]
        if error is not None:
            self.broken((self.rank + 1) % self.ranks, error)
            self.wait(lambda seconds: time.sleep(seconds), self.rank, what)
        return result  # type: ignore[return-value]

    def fail(self, error: BaseException) -> None:
        """This rank has failed: tell the others."""
        if isinstance(error, RankFailed):
            return
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).strip()
        self._publish(self._failed(self.rank, text))
        self._heard = True

    def broken(self, peer: int, error: BaseException) -> None:
        """A connection broke, which is not yet known to be the peer's fault."""
        if self._broken is None:
            reason = f"its connection to rank {self.rank} broke: {_first_line(error)}"
            self._broken = time.monotonic(), self._failed(peer, reason)

    def lost(self, rank: int, reason: str) -> RankFailed:
        """This rank has found out that another one has failed: tell the others, unless a failure is known already.
        Returns what is known then."""
        return self._publish(self._failed(rank, reason))

    def unexplained(self, error: BaseException) -> RankFailed:
        """A connection broke, and without the store nobody says at whose end."""
        if self._keeper is not None:
            return self.lost(self._keeper, self._without_store())
        if self.ranks == 2:
            return self.lost(1 - self.rank, f"its connection to rank {self.rank} broke: {_first_line(error)}")
        reason = f"{self._without_store()}, so that none of {self.of} can say which of them broke: {_first_line(error)}"
        self.failure = self.failure or _host_failed(reason, self._agent)
        return self.failure

    def leave(self) -> None:
        """The run is over: wait for the others, so that nobody mistakes a rank that has ended for one that has died."""
        self.set(f"done/{self.rank}", "1")
        keys = [self._key(f"done/{other}") for other in range(self.ranks)]
        self.wait(lambda seconds: self._all_there(keys, seconds), (self.rank + 1) % self.ranks, "the end")
        try:
            self.set(f"left/{self.rank}", "1")
            if self.rank == 0:  # it may keep the store that the others look into
                keys = [self._key(f"left/{other}") for other in range(self.ranks)]
                until = time.monotonic() + 2 * CAUSE
                while not self._store.check(keys) and time.monotonic() < until:
                    time.sleep(INTERVAL / 10)
        except Exception:  # the store went with a rank that was done
            pass

    def abandon(self) -> None:
        """Look no longer, after a failure. The first rank, whose process may keep the store, waits a little for the
        others to hear of it."""
        self._left.set()
        try:
            self._store.set(f"heard/{self.rank}", "1")
            gone = self.failure.rank if self.failure is not None else self.rank
            keys = [f"heard/{other}" for other in range(self.ranks) if other != gone]
            until = time.monotonic() + 2 * CAUSE
            while self.rank == 0 and not self._store.check(keys) and time.monotonic() < until:
                time.sleep(INTERVAL / 10)
        except Exception:  # the store is gone
            pass

    def close(self) -> None:
        """Look no longer; a rank that still needs this one hears that it has closed."""
        self._left.set()
        if threading.current_thread() is not self._thread:  # where the garbage collector happened to run
            self._thread.join(2 * INTERVAL)

    # ------------------------------------------------------------------ what ranks tell each other in a run
    def _key(self, key: str) -> str:
        return f"{self._run}/{key}"

    def set(self, key: str, value: str) -> None:
        """Tell all ranks something about this run."""
        self._store.set(self._key(key), value)

    def get(self, key: str) -> str | None:
        """What a rank has told about this run, None when nothing yet."""
        key = self._key(key)
        return self._store.get(key).decode() if self._store.check([key]) else None

    # ------------------------------------------------------------------ the thread
    def _failed(self, rank: int, reason: str) -> RankFailed:
        return RankFailed(rank, reason, self.of)

    def _all_there(self, keys: list[str], seconds: float) -> bool | None:
        try:
            if self._store.check(keys):
                return True
        except Exception:  # whoever kept the store was done before this rank looked
            return True
        time.sleep(min(seconds, INTERVAL / 10))
        return None

    def _publish(self, failure: RankFailed) -> RankFailed:
        """Tell all ranks, unless one has told something before; returns what stands in the store then."""
        try:
            if self.store_gone is not None:
                raise ConnectionError(self.store_gone)
            told = json.dumps([failure.rank, failure.reason])
            rank, reason = json.loads(self._store.compare_set("failed", "", told).decode() or told)
            failure = self._failed(rank, reason)
        except Exception:  # the store is gone: what this rank knows has to do
            pass
        self.failure = self.failure or failure
        return self.failure

    def _look(self) -> None:
        beat, known_since = 0, 0.0
        while not self._left.wait(INTERVAL if beat else 0):
            beat += 1
            if self.failure is None and self.store_gone is None:
                try:
                    self._beat(beat)
                except Exception as error:
                    if self._left.is_set():
                        return
                    self._lose_store(_first_line(error))
                known_since = time.monotonic()
            elif self.failure is None:
                if self._broken is None:
                    return
                known_since = time.monotonic()
                if known_since - self._broken[0] > CAUSE:
                    self.failure = self._broken[1]
            elif self._heard or not self.end_process:
                return
            elif self.aside:
                known_since = time.monotonic()
            elif time.monotonic() - known_since > GRACE:
                print(f"[rank {self.rank}] {self.failure}", file=sys.stderr, flush=True)
                os._exit(1)
        if self.failure is None and self.store_gone is None:
            with suppress(Exception):  # the store may be gone
                self._store.set(f"beat/{self.rank}", CLOSED)

    def _lose_store(self, why: str) -> None:
        """A pipeline needs it. Other ranks need each other only: whoever kept it may have ended well without them."""
        self.store_gone = why
        reason = self._without_store()
        keeper = self._keeper
        failure = _host_failed(reason, self._agent) if keeper is None else self._failed(keeper, reason)
        if self._closing_fails:
            self.failure = failure
        elif self._keeper is not None and self._keeper not in self.closed:
            self._broken = time.monotonic(), failure  # what it sent before may be under way

    def _without_store(self) -> str:
        return f"the store that its process keeps is gone: {self.store_gone}"

    def _beat(self, beat: int) -> None:
        self._store.set(f"beat/{self.rank}", f"{beat}{ASIDE if self.aside else ''}")
        if self._store.check(["failed"]):
            told = self._store.get("failed").decode()
            if told:
                self.failure = self._failed(*json.loads(told))
                return
        now = time.monotonic()
        for other, (last, since) in self._seen.items():
            new = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
            allowed = self.patience if last else self.timeout
            if new == CLOSED and self._closing_fails:
                self._publish(self._failed(other, "it has closed its pipeline"))
            elif new == CLOSED:
                self.closed.add(other)
            elif new != last:
                self._seen[other] = new, now
                (self._others_aside.add if new.endswith(ASIDE) else self._others_aside.discard)(other)
            elif now - since > allowed:
                self.lost(other, f"no sign of life for {allowed:g} s (was it killed?)")
