"""What the ranks of pipeline tests do."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_wan
import torch
import torch.distributed as dist
from long_video import SHAPE, euler, prompt, tiny_wan, unipc

import vdit_fast
from vdit_fast.parallel import SchedulerSampler, StagePipeline
from vdit_fast.parallel.checkpoint import Checkpoint

assert diffusers  # imported here, so that forked ranks have it

SETTINGS: dict[str, Any] = {"blocks": 4, "num_per_block": 4, "num_cat": 2, "guidance": 3.0, "seed": 5}


def pipeline_of(model: Any, **options: Any) -> StagePipeline:
    return StagePipeline(vdit_fast.accelerate(model, "exact"), **options)


def draw(pipeline: StagePipeline, steps: int, scheduler: Any = unipc, **other: Any) -> Any:
    settings = SETTINGS | other
    arguments = prompt(1 if settings["guidance"] == 1 else 2)
    return pipeline.generate(SchedulerSampler(scheduler(steps)), SHAPE, arguments, **settings)


def equal(folder: Path, steps: int, **other: Any) -> None:
    """The whole video; the first rank keeps it, every rank what it counted."""
    pipeline = pipeline_of(tiny_wan(), release=True)
    video = dict(draw(pipeline, steps, **other))
    facts = pipeline.facts()
    counted = {
        "facts": facts,
        "expected": pipeline.expected(),
        "iterations": pipeline.queue.iteration if pipeline.queue is not None else None,
        "weights": pipeline.stage.weight_bytes,
    }
    rank = dist.get_rank()
    (folder / f"counted{rank}.json").write_text(json.dumps(counted))
    pipeline.trace.write(folder, facts)
    if rank == 0:
        torch.save(video, folder / "video.pt")


def several(folder: Path, steps: int) -> None:
    """A whole video, then one without end that is dropped after three blocks on the same pipeline, then one on a new
    pipeline of the same ranks."""
    equal(folder, steps)
    model = tiny_wan()
    pipeline = pipeline_of(model)
    video = dict(itertools.islice(draw(pipeline, steps, blocks=None), 3))
    again = dict(draw(pipeline, steps, scheduler=euler, blocks=2, seed=9))
    if dist.get_rank() == 0:
        torch.save([video, again], folder / "more.pt")


def slow(folder: Path, steps: int, blocks: int, raise_on: int | None = None) -> None:
    """Keeps a checkpoint in every iteration, and takes its time for a signal to come. ``raise_on``: this rank fails."""
    pipeline = pipeline_of(tiny_wan())
    run = pipeline.stage.run

    def pass_(x: torch.Tensor, item: Any, *args: Any) -> torch.Tensor:
        time.sleep(0.03)
        if dist.get_rank() == raise_on and item.iteration == 3:
            raise ZeroDivisionError("a bug of this rank")
        return run(x, item, *args)

    pipeline.stage.run = pass_  # type: ignore[method-assign]
    checkpoint = Checkpoint(folder / "check")
    dict(draw(pipeline, steps, blocks=blocks, checkpoint=checkpoint))


def resting(folder: Path, steps: int, seconds: float) -> None:
    """Ranks that come, decode and rest for longer than ``seconds``, which is all that is waited for; then a bad
    argument of the first rank's in the third run."""
    pipeline = pipeline_of(tiny_wan(), patience=seconds, timeout=seconds)
    for _ in range(2):
        for index, _latents in draw(pipeline, steps, blocks=3):
            if index == 1:
                time.sleep(2 * seconds)
        if dist.get_rank() == 1:
            time.sleep(2 * seconds)
    draw(pipeline, steps, num_cat=99).send(None)


def late(folder: Path, steps: int) -> None:
    """The second rank comes late, and has been in a smaller pipeline before; then an error of the caller's."""
    small = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        dict(draw(pipeline_of(first := tiny_wan(), group=small), steps, blocks=2))
        del first
    if dist.get_rank() == 1:
        time.sleep(3)
    with pipeline_of(tiny_wan(), patience=1.5) as pipeline:
        for index, _latents in draw(pipeline, steps, blocks=None):
            if index == 1:
                raise MemoryError("decode failed")
