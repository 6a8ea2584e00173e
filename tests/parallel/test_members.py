"""A rank that fails while a sequence or guidance is shared: the others end in seconds and say which one it was."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked_ranks
import pytest

from vdit_fast.parallel import RankFailed
from vdit_fast.parallel.members import Members

LIMIT = 100
"""Seconds for everything, the start of processes included. No wait is to last until the groups' own time-out, 60."""


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forked_ranks.Ranks]:
    """Ranks that go through the cases, which are mostly waits, while the other tests of this file run."""
    ranks = forked_ranks.start("sequence_workers:several", tmp_path_factory.mktemp("ranks"), 2)
    yield ranks
    ranks.kill()  # where nobody asked for what they saw


@pytest.fixture(scope="module")
def found(several: forked_ranks.Ranks) -> list[dict[str, Any]]:
    """What every rank saw in every case."""
    several.finish(LIMIT)
    return [json.loads((several.folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(tmp_path: Path, victim: int) -> None:
    """The first one keeps the store."""
    ranks = forked_ranks.start("sequence_workers:killed", tmp_path, 2, victim=victim)
    pids, until = ranks.pids(), time.monotonic() + LIMIT
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < until and ranks.running, ranks.log(0)
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    codes = ranks.wait(LIMIT)
    assert time.monotonic() - killed < 10
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert f"RankFailed: rank {victim} of the sequence group failed" in ranks.log(1 - victim)


@pytest.mark.usefixtures("several")
def test_who_keeps_the_store_may_end_where_it_is_none_of_the_group(tmp_path: Path) -> None:
    forked_ranks.start("group_workers:outsider", tmp_path, 3).finish(LIMIT)
    assert (tmp_path / "error").read_text().startswith("rank 0 of the group [1, 2] failed: its connection to rank 1 ")


class Work:
    """Ends, well or not, just after the first wait for it has timed out."""

    def __init__(self, error: str = "") -> None:
        self.error, self.waits = error, 0

    def wait(self, timeout: timedelta | None = None) -> None:
        self.waits += 1
        if self.waits == 1 or self.error:
            raise RuntimeError("timed out" if self.waits == 1 else self.error)

    def is_completed(self) -> bool:
        return True


def test_what_ends_between_the_wait_and_the_look_at_it_has_not_failed() -> None:
    members = object.__new__(Members)
    members._on_device, members.patience = False, 0.01
    members._watch = watch = SimpleNamespace(check=lambda: None, closed=set(), store_gone=None)  # type: ignore[assignment]
    work = Work()
    members.run(lambda later: work)
    assert work.waits == 2
    watch.store_gone, watch.unexplained = "over", lambda error: RankFailed(1, str(error))
    with pytest.raises(RankFailed, match="rank 1 of the pipeline failed: Connection reset"):
        members.run(lambda later: Work("Connection reset"))


@pytest.mark.parametrize(
    ("how", "group", "words", "seconds"),
    [
        ("raises", "sequence", "ZeroDivisionError: a bug of this rank", 2.5),
        ("raises in its branch", "guidance", "ZeroDivisionError: a bug of this rank", 2.5),
        ("errs outside", "sequence", "MemoryError: the caller's own", 2.5),
        ("leaves", "sequence", "it has ended its part", 6),
        ("removes", "sequence", "it has ended its part", 6),
        ("removes its branch", "guidance", "it has ended its part", 6),
    ],
)
def test_the_other_rank_says_who_it_was(
    found: list[dict[str, Any]], how: str, group: str, words: str, seconds: float
) -> None:
    mine, other = found[0][how], found[1][how]
    assert mine["error"].startswith(f"RankFailed: rank 1 of the {group} group failed: ") and words in mine["error"]
    assert mine["waited"] < seconds
    assert other["error"] == ("" if words == "it has ended its part" else words)


def test_a_slow_rank_has_not_failed(found: list[dict[str, Any]]) -> None:
    """It takes twice the patience in the caller's code, and again in a block."""
    for rank in found:
        assert rank["is slow"]["error"] == "" and rank["is slow"]["waited"] > 4 and rank["is slow"]["far"] < 1e-5
