"""Long videos by a transformer that is split over ranks, which are threads of one process."""

from __future__ import annotations

import copy

import torch
from local_ring import run_ranks
from long_video import SHAPE, prompt, unipc

import vdit_fast
from vdit_fast.caching import TaylorSeer
from vdit_fast.parallel import SchedulerSampler, StagePipeline
from vdit_fast.parallel.transport import Alone

SETTINGS = {"blocks": 3, "num_per_block": 4, "num_cat": 2, "guidance": 3.0, "seed": 5}
PLANNED = vdit_fast.Config(attention=vdit_fast.Window(tile=(2, 2, 2), min_tokens=0, dense_steps=0))
CACHED = vdit_fast.Config(cache=TaylorSeer(granularity="block", interval=2))


def generate(pipeline, steps=4, scheduler=unipc, **other):
    settings = SETTINGS | other
    arguments = prompt(1 if settings["guidance"] == 1 else 2)
    return pipeline.generate(SchedulerSampler(scheduler(steps)), SHAPE, arguments, **settings)


def alone(model, config="exact", **other):
    with vdit_fast.accelerate(model, config) as handle:
        pipeline = StagePipeline(handle)
        video = dict(generate(pipeline, **other))
        pipeline.close()
    return video


def split(model, ranks, config="exact", options=None, **other):
    """Every rank's (video, pipeline)."""
    models = [copy.deepcopy(model) for _ in range(ranks)]

    def work(ring):
        handle = vdit_fast.accelerate(models[ring.rank], config)
        pipeline = StagePipeline(handle, transport=ring, release=True, **(options or {}))
        return dict(generate(pipeline, **other)), pipeline

    return run_ranks(work, ranks) if ranks > 1 else [work(Alone())]


def assert_equal(got, want):
    assert list(got) == list(want)
    for index in want:
        assert torch.equal(got[index], want[index]), index
