"""Checkpoints of a transformer split over ranks: the same video after a stop, of one run only, and who has none."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from local_ring import run_ranks
from long_video import SHAPE, prompt, unipc
from stage_cases import CACHED, SETTINGS, alone, assert_equal, generate, split

import vdit_fast
from vdit_fast.parallel import SchedulerSampler, StagePipeline
from vdit_fast.parallel.checkpoint import Checkpoint
from vdit_fast.parallel.packing import Compressed


def test_a_checkpoint_gives_the_same_video(model, tmp_path):
    """Stopped at any iteration and taken up by another process with another number of ranks."""
    one = alone(model, blocks=4)
    checkpoint = Checkpoint(tmp_path, every=2)
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, blocks=4, checkpoint=checkpoint)
        first = dict(itertools.islice(stream, 2))
        stream.close()
        pipeline.close()
    assert_equal(first, {index: one[index] for index in first})
    parts = split(model, 3, blocks=4, checkpoint=Checkpoint(tmp_path, every=2), resume=True)
    rest, pipeline = parts[0]
    assert pipeline.facts()["schedule"]["first"] == 4 and sorted(rest) == [1, 2, 3]
    assert_equal(rest, {index: one[index] for index in rest})
    assert torch.equal(checkpoint.block(0), one[0])
    with pytest.raises(ValueError, match=r"another run.*seed 5, not 6"):
        alone(model, blocks=4, seed=6, checkpoint=checkpoint, resume=True)
    checkpoint.file.write_bytes(b"no state")
    with pytest.raises(ValueError, match="cannot be read"):
        alone(model, blocks=4, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_crash_loses_no_finished_block(model, tmp_path, ranks):
    """The state that counts a block as finished is not there before the block is."""

    class Crashing(Checkpoint):
        def keep(self, index, latents):
            if index == 2:
                raise OSError("no space left")
            super().keep(index, latents)

    one = alone(model, blocks=5)
    with pytest.raises((OSError, RuntimeError)):
        split(model, ranks, blocks=5, checkpoint=Crashing(tmp_path))
    checkpoint = Checkpoint(tmp_path)
    rest = alone(model, blocks=5, checkpoint=checkpoint, resume=True)
    assert list(rest) == [2, 3, 4]
    assert_equal({index: checkpoint.block(index) for index in range(5)}, one)


@pytest.mark.parametrize("what", ["argument", "weights", "config", "sampler", "packing", "model"])
def test_a_checkpoint_is_of_one_run(model, tmp_path, what):
    """With and without resume; the message names what differs."""
    run = {"arguments": prompt(2), "sampler": SchedulerSampler(unipc(4)), "config": "exact", "packing": None}

    def draw(model, arguments, sampler, config, packing, count=None, **options):
        with vdit_fast.accelerate(model, config) as handle:
            pipeline = StagePipeline(handle, packing=packing)
            stream = pipeline.generate(sampler, SHAPE, arguments, **SETTINGS, **options)
            video = dict(itertools.islice(stream, count))
            stream.close()
            pipeline.close()
        return video

    draw(model, **run, count=1, checkpoint=Checkpoint(tmp_path))
    if what == "argument":
        run["arguments"] = {"encoder_hidden_states": run["arguments"]["encoder_hidden_states"].clone()}
        run["arguments"]["encoder_hidden_states"][1, 6, 15] += 1e-6
    elif what == "weights":
        model = copy.deepcopy(model)
        model.blocks[1].attn1.to_q.weight.mul_(1.001)
    elif what == "config":
        run["config"] = vdit_fast.Config(fuse="off")
    elif what == "sampler":
        run["sampler"] = SchedulerSampler(unipc(4), convert=lambda prediction, latents, step: prediction)
    elif what == "packing":
        run["packing"] = Compressed("bf16")
    else:
        model = copy.deepcopy(model)
        model.register_to_config(eps=1e-3)
    for resume in (True, False):
        with pytest.raises(ValueError, match=rf"another run: {what}[^;]*; run with"):
            draw(model, **run, checkpoint=Checkpoint(tmp_path), resume=resume)


def test_weights_of_other_ranks_are_those_of_the_checkpoint(model, tmp_path):
    """A run on one rank goes on on two, of which the second has other weights."""
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, checkpoint=Checkpoint(tmp_path))
        next(stream)
        stream.close()
        pipeline.close()
    changed = copy.deepcopy(model)
    changed.blocks[3].attn1.to_q.weight.mul_(1.001)
    models, errors = [changed, copy.deepcopy(changed)], []

    def work(ring):
        handle = vdit_fast.accelerate(models[ring.rank], "exact")
        try:
            checkpoint = Checkpoint(tmp_path)
            dict(generate(StagePipeline(handle, transport=ring, release=True), checkpoint=checkpoint, resume=True))
        except ValueError as error:
            errors.append(str(error))
        except RuntimeError:
            assert ring.rank == 0

    run_ranks(work, 2)
    assert len(errors) == 1 and errors[0].startswith("weights: those of rank 1 and of the first one")
    with vdit_fast.accelerate(model, "exact") as handle:
        assert list(dict(generate(StagePipeline(handle), checkpoint=Checkpoint(tmp_path), resume=True))) == [0, 1, 2]


def test_blocks_of_an_earlier_run_are_not_this_ones(model, tmp_path):
    """A folder whose run kept no state: its blocks are replaced, and not given out before that."""
    alone(model, seed=1, checkpoint=Checkpoint(tmp_path, every=99))
    checkpoint = Checkpoint(tmp_path, every=4)
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle)
        stream = generate(pipeline, checkpoint=checkpoint)
        first = next(stream)[1]
        next(stream)
        stream.close()
        pipeline.close()
    for reader in (checkpoint, Checkpoint(tmp_path)):
        assert torch.equal(reader.block(0), first)
        with pytest.raises(ValueError, match=r"block000002\.pt is of an earlier run"):
            reader.block(2)


def test_a_checkpoint_is_read_on_the_cpu(tmp_path, monkeypatch):
    """Files of a run on a GPU, on a machine that may have none."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine where CUDA tensors cannot be loaded")
    checkpoint, run = Checkpoint(tmp_path), {"weights": {}}
    checkpoint.begin(run, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        checkpoint.save({"latents": torch.arange(3.0)})
        checkpoint.keep(0, torch.arange(2.0))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(checkpoint.file, weights_only=True)
    state = Checkpoint(tmp_path).begin(run, True)
    assert torch.equal(state["latents"], torch.arange(3.0)) and torch.equal(checkpoint.block(0), torch.arange(2.0))


def test_a_scheduler_that_cannot_be_kept_has_no_checkpoint(model, tmp_path):
    """One with an object that changes in its steps; one that stays as it is may be there."""

    def scheduler(changes):
        made = unipc(4)
        made.constant, made.history = SimpleNamespace(a=[1.0, torch.ones(2)]), deque([0.0])
        step = type(made).step

        class Own(type(made)):
            def step(self, model_output, *args, **kwargs):
                if changes:
                    self.history.append(1.0)
                return step(self, model_output, *args, **kwargs)

        made.__class__ = Own
        return made

    checkpoint = Checkpoint(tmp_path)
    alone(model, scheduler=lambda steps: scheduler(False), checkpoint=checkpoint)
    assert_equal(
        alone(model, scheduler=lambda steps: scheduler(False), checkpoint=checkpoint, resume=True),
        {2: alone(model)[2]},
    )
    with pytest.raises(ValueError, match=r"scheduler: Own\.history changes in its steps and is a deque"):
        alone(model, scheduler=lambda steps: scheduler(True), checkpoint=Checkpoint(tmp_path / "other"))


def test_what_is_remembered_elsewhere_is_no_checkpoint(model, tmp_path):
    with pytest.raises(ValueError, match="taylorseer"):
        alone(model, CACHED, num_cat=0, checkpoint=Checkpoint(tmp_path))
    with pytest.raises(ValueError, match="num_cat"):
        alone(model, CACHED)


@pytest.mark.parametrize(
    ("planner", "steps"),
    [
        (vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0, heads="auto"), {}),
        (vdit_fast.planners.AdaSpa(block=8, sparsity=0.5, search=(2,), dense_steps=1, dense_layers=2), {"steps": 6}),
    ],
    ids=["window", "adaspa"],
)
def test_planners_that_remember_have_no_checkpoint(model, tmp_path, planner, steps):
    """Refused before anything is drawn, also where the first rank's layers are dense."""
    drawn = []

    def work(ring):
        pipeline = StagePipeline(vdit_fast.accelerate(models[ring.rank], config), transport=ring)
        pipeline.stage.run = lambda *_: drawn.append(ring.rank)
        return dict(generate(pipeline, checkpoint=Checkpoint(tmp_path), **steps)) if ring.rank == 0 else None

    models, config = [copy.deepcopy(model) for _ in range(2)], vdit_fast.Config(attention=planner)
    with pytest.raises(ValueError, match=rf"checkpoint: planner '{planner.name}' remembers"):
        run_ranks(work, 2)
    assert not drawn and not list(tmp_path.iterdir())


def test_a_planner_that_does_not_remember_has_a_checkpoint(model, tmp_path):
    fixed = vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0, heads="spatial")
    config, checkpoint = vdit_fast.Config(attention=fixed), Checkpoint(tmp_path, every=5)
    one = alone(model, config, checkpoint=checkpoint)
    assert_equal(alone(model, config, checkpoint=checkpoint, resume=True), {2: one[2]})


def test_what_a_planner_remembers_unsaid_is_seen(model, tmp_path):
    class Hidden(vdit_fast.Window):
        remembers = False

    hidden = vdit_fast.Config(attention=Hidden(tile=(2, 2, 2), min_tokens=0, dense_steps=0, heads="auto"))
    with pytest.raises(ValueError, match="remembers earlier steps"):
        alone(model, hidden, checkpoint=Checkpoint(tmp_path))
