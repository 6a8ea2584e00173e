"""The stage pipeline over real processes and gloo: equal bits, counted messages, failures, restart."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time

import forked_ranks
import pytest
import torch
from long_video import euler, tiny_wan
from pipeline_workers import draw, pipeline_of

from vdit_fast.parallel.checkpoint import Checkpoint
from vdit_fast.parallel.trace import KINDS, read_traces

STEPS = 4


def alone(count=None, **settings):
    pipeline = pipeline_of(model := tiny_wan())
    video = dict(itertools.islice(draw(pipeline, STEPS, **settings), count))
    del model
    return video


def assert_equal(got, want):
    assert list(got) == list(want)
    assert all(torch.equal(got[index], want[index]) for index in want)


def check_counts(folder, ranks, layers):
    for rank in range(ranks):
        counted = json.loads((folder / f"counted{rank}.json").read_text())
        facts = counted["facts"]
        hop = 2 * (2 + 4) * 16 * 32 * 4  # branches, frames, tokens, channels, bytes
        assert facts["hop_bytes"] == hop and facts["layers"] == layers[rank]
        sent = [16, 16 * hop] if rank < ranks - 1 else [16, 4 * 4 * 64 * 4 * (4 * 4 + 2)]
        received = [16, 16 * hop] if rank else [16, 4 * 4 * 64 * 4 * (4 * 4 + 2)]
        assert facts["sent"] == sent == counted["expected"]["sent"]
        assert facts["received"] == received == counted["expected"]["received"]
        assert counted["iterations"] == (STEPS + 4 - 1 if rank == 0 else None)


def check_traces(folder, ranks):
    traces = read_traces(folder)
    assert len(traces) == ranks
    for trace in traces:
        events = trace["events"]
        assert {kind for kind, *_ in events} <= set(KINDS)
        order = [(i, b) for kind, i, b, *_ in events if kind == "compute"]
        assert order == [(i, b) for i in range(7) for b in range(min(i, 3), max(0, i - 3) - 1, -1)]
        assert all(0 <= begin <= end <= trace["ended"] - trace["began"] for *_, begin, end in events)


def test_two_ranks_are_one(tmp_path):
    """The same bits, messages and bytes by the formula; early ends, another run, another pipeline."""
    forked_ranks.start("pipeline_workers:several", tmp_path, 2, steps=STEPS).finish(100)
    assert_equal(torch.load(tmp_path / "video.pt"), alone())
    check_counts(tmp_path, 2, [2, 2])
    check_traces(tmp_path, 2)
    endless, again = torch.load(tmp_path / "more.pt")
    assert_equal(endless, alone(3, blocks=None))
    assert_equal(again, alone(scheduler=euler, blocks=2, seed=9))


def test_four_ranks_are_one(tmp_path):
    forked_ranks.start("pipeline_workers:equal", tmp_path, 4, steps=STEPS).finish(100)
    assert_equal(torch.load(tmp_path / "video.pt"), alone())
    check_counts(tmp_path, 4, [1, 1, 1, 1])
    check_traces(tmp_path, 4)


@pytest.mark.parametrize("victim", [None, *(pytest.param(rank, marks=pytest.mark.slow) for rank in range(3))])
def test_a_killed_rank_ends_all_and_the_checkpoint_gives_the_same_video(tmp_path, victim):
    """SIGKILL at a random moment, of the first rank, which keeps the store, a middle one or the last one; the restart
    has another number of ranks."""
    blocks = 30
    victim = random.randrange(3) if victim is None else victim
    ranks = forked_ranks.start("pipeline_workers:slow", tmp_path, 3, steps=STEPS, blocks=blocks)
    pids, state = ranks.pids(), tmp_path / "check" / "state.pt"
    until = time.monotonic() + 60
    while not state.is_file():
        assert time.monotonic() < until and ranks.running, ranks.log(0)
        time.sleep(0.01)
    time.sleep(2 * random.random())
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    codes = ranks.wait(30)
    assert time.monotonic() - killed < 30
    assert codes[victim] == -signal.SIGKILL and all(code == 1 for rank, code in enumerate(codes) if rank != victim)
    for rank in {0, 1, 2} - {victim}:
        assert f"RankFailed: rank {victim} of the pipeline failed" in ranks.log(rank), ranks.log(rank)

    checkpoint = Checkpoint(tmp_path / "check")
    pipeline = pipeline_of(model := tiny_wan())
    rest = dict(draw(pipeline, STEPS, blocks=blocks, checkpoint=checkpoint, resume=True))
    first = pipeline.facts()["schedule"]["first"]
    assert 0 < first < blocks + STEPS - 1 and len(rest) == blocks - max(0, first - STEPS + 1)
    assert_equal({index: checkpoint.block(index) for index in range(blocks)}, alone(blocks=blocks))
    del model


def test_an_error_of_one_rank_is_shown_by_all(tmp_path):
    ranks = forked_ranks.start("pipeline_workers:slow", tmp_path, 2, steps=STEPS, blocks=9, raise_on=1)
    assert ranks.wait(90) == [1, 1]
    assert "ZeroDivisionError: a bug of this rank" in ranks.log(1)
    assert "rank 1 of the pipeline failed" in ranks.log(0) and "ZeroDivisionError: a bug of this rank" in ranks.log(0)


def test_the_callers_time_is_nobodys_wait(tmp_path):
    """Slow consumers and rests between runs; a failure in a later run is told at once, with its reason."""
    ranks = forked_ranks.start("pipeline_workers:resting", tmp_path, 2, steps=2, seconds=1.5)
    assert ranks.wait(60) == [1, 1]
    assert "ValueError: num_cat: 99" in ranks.log(0)
    assert "rank 0 of the pipeline failed" in ranks.log(1) and "ValueError: num_cat: 99" in ranks.log(1)


def test_an_error_of_the_caller_leaves_the_block_on_all_ranks(tmp_path):
    ranks = forked_ranks.start("pipeline_workers:late", tmp_path, 3, steps=2)
    assert ranks.wait(60) == [1, 1, 1]
    for rank in range(3):
        assert "MemoryError: decode failed" in ranks.log(rank), ranks.log(rank)
    assert "RankFailed: rank 0 of the pipeline failed" in ranks.log(1)
