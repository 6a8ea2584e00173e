"""Closed forms of the pipeline: the split of the layers, the queue's order, messages; the noise pool."""

from __future__ import annotations

import itertools

import pytest
import torch

from vdit_fast.parallel import NoisePool, Schedule, split_layers


@pytest.mark.parametrize(("layers", "ranks"), [(1, 1), (6, 4), (7, 3), (30, 8), (40, 7), (5, 5)])
def test_layers_are_split_equally_with_the_rest_on_the_first_ranks(layers, ranks):
    parts = split_layers(layers, ranks)
    assert [i for part in parts for i in part] == list(range(layers))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1
    assert sizes.count(layers // ranks + 1) == layers % ranks


def test_layers_can_be_split_by_hand():
    assert split_layers(6, 3, (1, 3, 2)) == [range(0, 1), range(1, 4), range(4, 6)]
    for wrong in ((3, 3), (0, 3, 3), (2, 2, 3)):
        with pytest.raises(ValueError, match="layers_per_stage"):
            split_layers(6, 3, wrong)
    with pytest.raises(ValueError, match="1 to 6 ranks"):
        split_layers(6, 7)


@pytest.mark.parametrize(("steps", "blocks"), [(1, 1), (1, 5), (5, 1), (5, 3), (3, 9), (50, 32)])
def test_every_block_gets_every_step_once_in_steps_plus_blocks_minus_1_iterations(steps, blocks):
    """P1a, P1b."""
    schedule = Schedule(steps, blocks, 8, 4)
    items = list(schedule.items())
    assert len(items) == steps * blocks == schedule.count()
    assert schedule.iterations == steps + blocks - 1 == items[-1].iteration + 1
    for block in range(blocks):
        mine = [item for item in items if item.block == block]
        assert [item.step for item in mine] == list(range(steps))
        assert [item.iteration for item in mine] == list(range(block, block + steps))
    for _, group in itertools.groupby(items, key=lambda item: item.iteration):
        order = [item.block for item in group]
        assert order == sorted(order, reverse=True) and len(order) <= min(steps, blocks)  # tail first
    for first in range(schedule.iterations):
        assert list(schedule.items(first)) == [item for item in items if item.iteration >= first]
        assert schedule.count(first) == len(list(schedule.items(first)))


def test_without_end_the_queue_is_as_long_as_the_schedule():
    schedule = Schedule(4, None, 8, 8)
    assert schedule.iterations is None and schedule.count() is None
    assert [len(schedule.queued(i)) for i in range(8)] == [1, 2, 3, 4, 4, 4, 4, 4]
    first = list(itertools.islice(schedule.items(), 10 + 4 * 20))
    assert len({item.block for item in first if item.step == 3}) == first[-1].iteration - 2


def test_message_formula():
    """P1c: 2 · (num_cat + num_per_block) · p · C values; Wan 1.3B at 480p 153 MB, Wan 14B at 720p 1.18 GB."""
    schedule = Schedule(50, 32, 8, 8)
    assert 2 * schedule.hop_values(2, 30 * 52, 1536) == 153_354_240
    assert 2 * schedule.hop_values(2, 45 * 80, 5120) == 1_179_648_000
    assert schedule.result_total(16) == sum(16 * schedule.frames_of(item.block) for item in schedule.items())
    assert schedule.result_total(16) == 50 * 16 * schedule.video_frames(32) and schedule.video_frames(32) == 264


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"blocks": 0}, "blocks"),
        ({"num_per_block": 0}, "num_per_block"),
        ({"num_cat": -1}, "num_cat"),
        ({"num_cat": 9}, "direct"),
        ({"steps": 2.0}, "steps"),
    ],
)
def test_bad_sizes_are_named(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Schedule(**({"steps": 4, "blocks": 2, "num_per_block": 8, "num_cat": 4} | kwargs))


@pytest.mark.parametrize(("per_block", "cat"), [(8, 8), (10, 5), (3, 0), (1, 1), (7, 2)])
def test_no_window_sees_a_frame_of_noise_twice(per_block, cat):
    """A window, num_cat frames before a block and the block, holds all frames of the pool, each once; the first
    num_cat are the end of the block before."""
    noise = NoisePool((2, 3, 4), per_block, cat, seed=3)
    frames = [noise.draw()]
    assert frames[0].shape == (2, cat + per_block, 3, 4)
    pool = {frame.numpy().tobytes() for frame in frames[0].unbind(1)}
    assert len(pool) == cat + per_block
    for _ in range(6):
        end, block = frames[-1][:, frames[-1].shape[1] - cat :], noise.draw()
        assert block.shape[1] == per_block
        window = [frame.numpy().tobytes() for frame in torch.cat((end, block), 1).unbind(1)]
        assert set(window) == pool and len(window) == len(pool)
        frames.append(block)


def test_noise_goes_on_from_its_state():
    first, second = (NoisePool((2, 3, 4), 5, 2, seed=8) for _ in range(2))
    for _ in range(3):
        first.draw()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(first.draw(), second.draw()) for _ in range(4))
    other = NoisePool((2, 3, 4), 5, 2, seed=9)
    assert not torch.equal(other.draw(), NoisePool((2, 3, 4), 5, 2, seed=8).draw())
