"""A rank that fails while a sequence or guidance is shared: the others end in seconds and say which one it was."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import forked_ranks
import pytest

LIMIT = 40
"""Seconds for everything, the start of two processes included; the process group's own time-out is 60."""


def waited(ranks: forked_ranks.Ranks, rank: int) -> float:
    (found,) = re.findall(r"^waited ([\d.]+)$", ranks.log(rank), re.MULTILINE)
    return float(found)


def test_a_rank_that_raises_in_a_block(tmp_path: Path) -> None:
    """Its process lives on, so that no connection breaks."""
    ranks = forked_ranks.start("sequence_workers:sequence", tmp_path, 2, how="raises", victim=1)
    pids = ranks.pids()
    until = time.monotonic() + LIMIT
    while "RankFailed" not in ranks.log(0):
        assert time.monotonic() < until, ranks.log(0)
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGKILL)
    assert ranks.wait(10) == [1, -signal.SIGKILL]
    log = ranks.log(0)
    assert "RankFailed: rank 1 of the sequence group failed" in log and "ZeroDivisionError: a bug of this rank" in log
    assert waited(ranks, 0) < 5


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(tmp_path: Path, victim: int) -> None:
    """The first one keeps the store."""
    ranks = forked_ranks.start("sequence_workers:sequence", tmp_path, 2, how="is killed", victim=victim, patience=2.0)
    pids, until = ranks.pids(), time.monotonic() + LIMIT
    while not all((tmp_path / f"waits{rank}").exists() for rank in range(2)):
        assert time.monotonic() < until and ranks.process.poll() is None, ranks.log(0)
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    codes = ranks.wait(LIMIT)
    assert time.monotonic() - killed < 12
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert f"RankFailed: rank {victim} of the sequence group failed" in ranks.log(1 - victim)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("leaves", "it has ended its part"),
        ("ends", "(it has ended its part|the store that its process may keep is gone|no sign of life)"),
        ("errs outside", "MemoryError: the caller's own"),
    ],
)
def test_a_rank_that_exchanges_no_more(tmp_path: Path, how: str, words: str) -> None:
    ranks = forked_ranks.start("sequence_workers:sequence", tmp_path, 2, how=how, victim=1, patience=2.0)
    pids, until = ranks.pids(), time.monotonic() + LIMIT
    while "waited" not in ranks.log(0):
        assert time.monotonic() < until, ranks.log(0)
        time.sleep(0.05)
    if how == "leaves":
        os.kill(pids[1], signal.SIGKILL)
    assert ranks.wait(20)[0] == 1
    assert re.search(f"RankFailed: rank 1 of the sequence group failed: .*{words}", ranks.log(0), re.DOTALL)
    assert waited(ranks, 0) < 10


def test_a_slow_rank_has_not_failed(tmp_path: Path) -> None:
    forked_ranks.start("sequence_workers:sequence", tmp_path, 2, how="sleeps", victim=1, patience=1.0).finish(LIMIT)


def test_a_rank_that_raises_in_its_branch(tmp_path: Path) -> None:
    ranks = forked_ranks.start("sequence_workers:guidance", tmp_path, 2)
    assert ranks.wait(LIMIT) == [1, 1]
    log = ranks.log(0)
    assert "rank 1 of the guidance group failed" in log and "ZeroDivisionError: a bug of this rank" in log
