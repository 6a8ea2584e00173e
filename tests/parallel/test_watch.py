"""What ranks know of each other: signs of life, patience, failures, and the time that is the caller's."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vdit_fast.parallel import watch as watching
from vdit_fast.parallel.watch import RankFailed, Watch, reach

LIMIT = 5.0


class Store:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.gone = False

    def set(self, key: str, value: str) -> None:
        with self.lock:
            self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise ConnectionError("Broken pipe")
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        with self.lock:
            if self.values.get(key, b"") == expected.encode():
                self.values[key] = value.encode()
            return self.values[key]


Make = Callable[..., Watch]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def make(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    for name, seconds in (("INTERVAL", 0.02), ("CAUSE", 0.2), ("GRACE", 0.3)):
        monkeypatch.setattr(watching, name, seconds)
    made: list[Watch] = []

    def new(rank: int, ranks: int = 2, **options: Any) -> Watch:
        made.append(Watch(store, rank, ranks, **{"patience": 0.3, "timeout": 20.0, "end_process": False, **options}))
        return made[-1]

    yield new
    for one in made:
        one.close()


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.005)


def test_a_rank_may_come_late_and_rest_between_runs(make: Make) -> None:
    first = make(0)
    time.sleep(0.8)  # more than the patience
    first.check()
    second = make(1)
    for _ in range(2):
        first.begin()
        second.begin()
        second.aside = True
        leaving = threading.Thread(target=first.leave)
        leaving.start()
        time.sleep(0.8)
        second.leave()
        leaving.join(LIMIT)
        assert not leaving.is_alive() and first.failure is second.failure is None


def test_who_never_comes_and_who_goes_silent(make: Make, store: Store) -> None:
    one = make(0, ranks=3, timeout=0.6)
    until(lambda: one.failure)
    with pytest.raises(RankFailed, match=r"rank [12] .*no sign of life for 0\.6 s"):
        one.check()
    store.values.clear()
    two = make(0)
    store.set("beat/1", "7")
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 .*no sign of life for 0\.3 s"):
        two.wait(lambda seconds: time.sleep(seconds), 1, "a message")
    assert 0.25 < time.monotonic() - began < LIMIT


def test_a_wait_ends_unless_a_rank_is_in_the_callers_code(make: Make) -> None:
    first, second = make(0), make(1, timeout=0.3)
    first.aside = True
    until(lambda: 0 in second._others_aside)
    until_then = time.monotonic() + 1.0
    second.wait(lambda seconds: time.sleep(seconds) or (time.monotonic() > until_then or None), 0, "a message")
    first.aside = False
    with pytest.raises(RankFailed, match=r"rank 0 .*waited 0\.3 s for a message in vain"):
        second.wait(lambda seconds: time.sleep(seconds), 0, "a message")


def test_a_failure_is_told_in_every_run(make: Make) -> None:
    first, second = make(0), make(1)
    for one in (first, second):
        one.begin()
        one.begin()
    first.fail(ValueError("a bad argument"))
    first.abandon()
    with pytest.raises(RankFailed, match="rank 0 of the pipeline failed") as error:
        second.wait(lambda seconds: time.sleep(seconds), 0, "a message")
    assert "ValueError: a bad argument" in error.value.reason
    with pytest.raises(RankFailed):
        second.begin()


def test_a_closed_rank_is_missed_by_who_needs_it(make: Make) -> None:
    first, second = make(0), make(1)
    second.close()
    with pytest.raises(RankFailed, match=r"rank 1 .*has closed its pipeline"):
        first.wait(lambda seconds: time.sleep(seconds), 1, "a message")


def test_a_closed_rank_of_a_group_is_noted_only(make: Make) -> None:
    first, second = make(0, closing_fails=False, of="the group"), make(1)
    second.close()
    until(lambda: first.closed == {1})
    time.sleep(0.6)  # more than the patience
    first.check()
    assert str(first.lost(1, "it is needed")) == "rank 1 of the group failed: it is needed"
    with pytest.raises(RankFailed, match="rank 1 of the group failed"):
        first.check()


def test_a_lost_store_is_no_failure_of_a_group_that_does_not_keep_it(make: Make, store: Store) -> None:
    two, three = (
        make(1, ranks=ranks, patience=20.0, closing_fails=False, of="the group", keeper=None, end_process=True)
        for ranks in (2, 3)
    )
    store.gone = True
    until(lambda: two.store_gone and three.store_gone)
    time.sleep(0.6)  # more than what was sent before, and a process, are waited for
    for one in (two, three):
        one.check()
        assert not one._thread.is_alive()
    reset = ConnectionError("Connection reset")
    assert str(two.unexplained(reset)) == "rank 0 of the group failed: its connection to rank 1 broke: Connection reset"
    assert str(three.unexplained(reset)) == (
        "rank 0 of all ranks, the process that keeps the store, failed: the store that its process keeps is gone: "
        "Broken pipe, so that none of the group can say which of them broke: Connection reset"
    )
    for one in (two, three):
        with pytest.raises(RankFailed):
            one.check()


def test_a_lost_store_of_the_launchers_agent_is_no_ranks_failure(make: Make, store: Store) -> None:
    pipeline = make(0, ranks=3, keeper=None, agent=True)
    group = make(1, ranks=3, closing_fails=False, of="the group", keeper=None, agent=True)
    store.gone = True
    until(lambda: pipeline.failure and group.store_gone)
    words = "the launcher's agent, whose process keeps the store and is no rank's, failed: "
    with pytest.raises(RankFailed, match=f"^{words}the store that its process keeps is gone: Broken pipe$") as error:
        pipeline.check()
    assert error.value.rank == -1
    group.check()  # needs the other ranks only
    gone = str(group.unexplained(ConnectionError("Connection reset")))
    assert gone.startswith(words) and "none of the group can say which of them broke: Connection reset" in gone
    with pytest.raises(RankFailed, match=f"^{words}the store cannot be reached: refused"):
        reach(lambda: (_ for _ in ()).throw(ConnectionError("refused")), 1.0, agent=True)


@pytest.mark.parametrize("closed", [False, True])
def test_a_lost_store_is_a_failure_where_one_of_the_ranks_kept_it(make: Make, store: Store, closed: bool) -> None:
    """A group waits for what that one sent before; one that had ended its part before has not failed."""
    pipeline = make(2, ranks=3, keeper=1)
    group = make(2, ranks=3, closing_fails=False, of="the group", keeper=1)
    group.closed |= {1} if closed else set()
    store.gone = True
    until(lambda: pipeline.failure and group.store_gone)
    with pytest.raises(RankFailed, match=r"rank 1 of the pipeline failed: .*Broken pipe"):
        pipeline.check()
    group.check()
    time.sleep(0.4)
    if closed:
        group.check()
        return
    with pytest.raises(RankFailed, match="rank 1 of the group failed: the store that its process keeps is gone"):
        group.check()


def test_a_process_that_waits_for_who_kept_the_store_is_ended(make: Make, store: Store, monkeypatch: Any) -> None:
    ended = threading.Event()
    monkeypatch.setattr(watching.os, "_exit", lambda code: ended.set())
    make(1, closing_fails=False, end_process=True)
    store.gone = True
    assert ended.wait(LIMIT)


def test_runs_have_keys_of_their_own(make: Make) -> None:
    first, second = make(0), make(1)
    for one in (first, second):
        one.begin()
    first.set("ended", "3")
    assert second.get("ended") == "3"
    second.begin()
    assert second.get("ended") is None


def test_no_process_ends_in_the_callers_code(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(watching.os, "_exit", lambda code: ended.set())
    first, second = make(0, end_process=True), make(1)
    first.aside = True
    second.fail(ValueError("no"))
    until(lambda: first.failure)
    assert not ended.wait(0.8)
    first.aside = False  # and does not come back from a call
    assert ended.wait(LIMIT)


def test_a_store_that_does_not_answer(make: Make) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"keeps the store, .*cannot be reached: no answer within 0\.2 s"):
        reach(lambda: time.sleep(3), 0.2)
    assert time.monotonic() - began < 2
    with pytest.raises(RankFailed, match="refused"):
        reach(lambda: (_ for _ in ()).throw(ConnectionError("refused")), 1.0)
    assert reach(lambda: 4, 1.0) == 4


def test_what_is_left_half_way_is_closed_before_threads_stand_still() -> None:
    script = """
import threading, queue
from vdit_fast.parallel.at_exit import closed_at_exit
asked, answers = queue.Queue(), queue.Queue()
def answer():
    while True:
        answers.put(asked.get() + 1)
threading.Thread(target=answer, daemon=True).start()
@closed_at_exit
def work():
    try:
        while True:
            yield 1
    finally:
        asked.put(1)
        print("answered", answers.get(timeout=2), flush=True)
made = work()
next(made)
raise MemoryError("decode failed")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "answered 2\n" and "MemoryError" in done.stderr, done
