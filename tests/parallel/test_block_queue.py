"""The queue of frame blocks, without a model: what a pass gets, order, constant memory, snapshots."""

from __future__ import annotations

import io
from typing import ClassVar

import pytest
import torch

from vdit_fast.parallel import BlockQueue, NoisePool, Schedule

SHAPE = (2, 3, 4)


class Counting:
    """A schedule whose state counts; a step adds the prediction and the count."""

    timesteps: ClassVar = [9.0, 5.0, 2.0]

    def fresh(self):
        return [0]

    def step(self, state, prediction, latents, step):
        assert state[0] == step
        state[0] += 1
        return latents + prediction + step

    def save(self, state):
        return {"count": state[0]}

    def load(self, saved):
        return [saved["count"]]


def make(blocks=5, per_block=4, cat=2, seed=0):
    schedule = Schedule(3, blocks, per_block, cat)
    return BlockQueue(schedule, Counting(), NoisePool(SHAPE, per_block, cat, seed))


def predict(x, block):
    """What a transformer might say of a pass: it depends on everything in it."""
    return torch.sin(x + x.mean()) * (block + 1)


def advance(queue, seen=None):
    """One iteration; the blocks that leave."""
    gone = []
    for item in queue.begin():
        assert queue.ready(item.block)
        x = queue.inputs(item.block)
        if seen is not None:
            seen.append((item, x))
        own = x[:, :, x.shape[2] - queue.schedule.frames_of(item.block) :]
        block = queue.apply(item.block, predict(x, item.block)[:, :, -own.shape[2] :])
        if block is not None:
            gone.append((block.index, block.latents))
    return gone


def finish(queue):
    gone = []
    while queue.iteration < queue.schedule.iterations:
        gone += advance(queue)
    return gone


def test_a_pass_has_the_end_of_the_cleaner_block_as_it_is_then():
    queue, seen, gone = make(), [], {}
    history: dict[int, list[torch.Tensor]] = {}
    for iteration in range(queue.schedule.iterations):
        before = {index: block.latents for index, block in queue.blocks.items()} | gone
        begun = len(seen)
        gone |= dict(advance(queue, seen))
        for item, x in seen[begun:]:
            assert x.shape[2] == 6 and item.iteration == iteration
            if item.block:
                assert torch.equal(x[:, :, :2], before[item.block - 1][:, :, -2:])
            history.setdefault(item.block, []).append(x)
    assert sorted(gone) == list(range(5)) and all(len(passes) == 3 for passes in history.values())
    assert [gone[i].shape[2] for i in range(5)] == [6, 4, 4, 4, 4] and not queue.blocks


def test_without_context_blocks_do_not_know_each_other():
    """num_cat = 0: the clip of each block is that of a queue which has only its noise."""
    whole = dict(finish(make(cat=0)))
    noise = NoisePool(SHAPE, 4, 0, 0)
    for index in range(5):
        x = noise.draw()[None]
        for step in range(3):
            x = x + predict(x, index) + step
        assert torch.equal(whole[index], x)


def test_memory_does_not_grow():
    queue = make(blocks=None)
    sizes = []
    for _ in range(60):
        advance(queue)
        sizes.append(queue.nbytes)
    assert len(set(sizes[5:])) == 1 and len(queue.blocks) == 2 and queue.finished == 58


def test_a_block_waits_for_its_own_and_its_cleaner_neighbours_result():
    queue = make()
    advance(queue)
    advance(queue)
    items = queue.begin()
    assert [item.block for item in items] == [2, 1, 0]
    xs = [queue.inputs(item.block) for item in items]
    assert not any(queue.ready(index) for index in (0, 1, 2)) and not queue.ready(3)
    queue.apply(2, predict(xs[0], 2)[:, :, 2:])
    assert not queue.ready(2)  # block 1 is still under way
    queue.apply(1, predict(xs[1], 1)[:, :, 2:])
    assert queue.ready(2) and not queue.ready(1)
    with pytest.raises(ValueError, match="prediction"):
        queue.apply(0, xs[0][:, :, :3])


@pytest.mark.parametrize("at", range(1, 7))
def test_a_snapshot_gives_the_same_video(at):
    """Taken while results are under way, read back from a file, finished by another queue."""
    queue, kept = make(), []
    for _ in range(at - 1):
        advance(queue)
    items = queue.begin()
    xs = {item.block: queue.inputs(item.block) for item in items}

    def store(snapshot):
        buffer = io.BytesIO()
        torch.save(snapshot.state_dict(), buffer)
        buffer.seek(0)
        kept.append(torch.load(buffer, weights_only=True))

    queue.snapshot(store)
    assert not kept  # nothing has come back yet
    rest = []
    for item in items:
        own = queue.schedule.frames_of(item.block)
        block = queue.apply(item.block, predict(xs[item.block], item.block)[:, :, -own:])
        rest += [] if block is None else [(block.index, block.latents)]
    assert len(kept) == 1
    left = len(rest)
    rest += finish(queue)
    other = make(seed=99)
    other.load(kept[0])
    assert other.iteration == at and other.finished == max(0, at - 2)
    again = finish(other)
    assert [index for index, _ in again] == [index for index, _ in rest[left:]]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again, rest[left:], strict=True))


def test_the_schedule_must_fit_the_sampler():
    with pytest.raises(ValueError, match="3 timesteps"):
        BlockQueue(Schedule(4, 2, 4, 2), Counting(), NoisePool(SHAPE, 4, 2))


class Remembering(Counting):
    """Keeps the last prediction where the latents are, and a table on the CPU."""

    def fresh(self):
        return [0, None, torch.ones(2)]

    def step(self, state, prediction, latents, step):
        state[1] = prediction
        return super().step(state, prediction, latents, step)

    def save(self, state):
        return {"count": state[0], "last": [state[1]], "table": state[2]}

    def load(self, saved):
        return [saved["count"], *saved["last"], saved["table"]]


def test_a_state_is_loaded_to_the_device_of_the_queue():
    """What was with the latents comes to where they are now; what a schedule has on the CPU stays there."""
    schedule, kept = Schedule(3, 5, 4, 2), []
    queue = BlockQueue(schedule, Remembering(), NoisePool(SHAPE, 4, 2), "meta")
    advance(queue)
    advance(queue)
    queue.snapshot(lambda snapshot: kept.append(snapshot.state_dict()))
    assert [block["here"] for block in kept[0]["blocks"]] == [[True, False]] * 2
    host = [block | {"latents": torch.ones(block["latents"].shape)} for block in kept[0]["blocks"]]
    for block in host:
        block["state"] = block["state"] | {"last": [torch.ones(block["latents"].shape)]}
    queue.load(kept[0] | {"blocks": host})
    for block in queue.blocks.values():
        assert block.latents.is_meta and block.state[1].is_meta and block.state[2].device.type == "cpu"
    advance(queue)
