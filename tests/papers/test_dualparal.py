"""DualParal: Minute-Long Videos with Dual Parallelisms (arXiv 2505.21070).

A queue of frame blocks over stages of a transformer: 2 processes over gloo give the clip of one, in T + n - 1
iterations (P1a), every stage computes T · n passes (P1b), and messages and bytes are those of the formula (P1c).
"""

from __future__ import annotations

import json

import forked_ranks
import pytest
import torch
from long_video import tiny_wan
from pipeline_workers import SETTINGS, draw, pipeline_of

from vdit_fast.parallel.trace import read_traces

T, BLOCKS = 5, SETTINGS["blocks"]
TOKENS, CHANNELS = 16, 32  # of a latent frame, of the stream


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks wrote; each has 2 of the 4 blocks of a Wan."""
    folder = tmp_path_factory.mktemp("two")
    forked_ranks.start("pipeline_workers:equal", folder, 2, steps=T).finish(100)
    return folder


def test_two_processes_draw_the_clip_of_one(two):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = tiny_wan()
        one = dict(draw(pipeline_of(model), T))
    finally:
        torch.set_num_threads(threads)
    got = torch.load(two / "video.pt")
    assert list(got) == list(one) == list(range(BLOCKS))
    assert all(torch.equal(got[index], one[index]) for index in one)
    frames = SETTINGS["num_cat"] + BLOCKS * SETTINGS["num_per_block"]
    assert sum(block.shape[2] for block in got.values()) == frames


def test_iterations_and_passes(two):
    """P1a: T + n - 1 iterations; P1b: T · n passes on every rank, the noisiest block of an iteration first."""
    counted = json.loads((two / "counted0.json").read_text())
    assert counted["iterations"] == T + BLOCKS - 1
    for trace in read_traces(two):
        passes = [(i, block) for kind, i, block, *_ in trace["events"] if kind == "compute"]
        assert len(passes) == T * BLOCKS and {i for i, _ in passes} == set(range(T + BLOCKS - 1))
        assert passes == sorted(passes, key=lambda entry: (entry[0], -entry[1]))


def test_messages_and_bytes_are_those_of_the_formula(two):
    """P1c: per pass and hop 2 (guidance) · (num_cat + num_per_block) · p · C values, and nothing for the context; the
    result is a block's own frames."""
    hop = 2 * (SETTINGS["num_cat"] + SETTINGS["num_per_block"]) * TOKENS * CHANNELS * 4
    result = T * (SETTINGS["num_cat"] + BLOCKS * SETTINGS["num_per_block"]) * 4 * 8 * 8 * 4
    want = [T * BLOCKS, T * BLOCKS * hop], [T * BLOCKS, result]
    for rank in range(2):
        facts = json.loads((two / f"counted{rank}.json").read_text())["facts"]
        assert (facts["sent"], facts["received"]) == (want[rank], want[1 - rank])


def test_weights_are_shared_out(two):
    """W / N, the embeddings on the first rank, the head on the last."""
    sizes = {name: p.numel() * 4 for name, p in tiny_wan().named_parameters()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    embeddings = sum(size for name, size in sizes.items() if "embed" in name)
    weights = [json.loads((two / f"counted{rank}.json").read_text())["weights"] for rank in range(2)]
    assert weights == [blocks // 2 + embeddings, blocks // 2 + sum(sizes.values()) - blocks - embeddings]
