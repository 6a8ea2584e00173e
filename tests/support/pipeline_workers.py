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


def draw(folder: Path | None, pipeline: StagePipeline, steps: int, scheduler: Any = unipc, **other: Any) -> Any:
    settings = SETTINGS | other
    arguments = prompt(1 if settings["guidance"] == 1 else 2)
    return pipeline.generate(SchedulerSampler(scheduler(steps)), SHAPE, arguments, **settings)


def equal(folder: Path, steps: int, **other: Any) -> None:
    """The whole video; the first rank keeps it, every rank what it counted."""
    pipeline = pipeline_of(tiny_wan(), release=True)
    video = dict(draw(folder, pipeline, steps, **other))
    rank, transport = dist.get_rank(), pipeline.transport
    if rank == 0:
        torch.save(video, folder / "video.pt")
    sent, received = transport.sent, transport.received
    counted = {
        "sent": [sent.messages, sent.bytes],
        "received": [received.messages, received.bytes],
        "weights": pipeline.stage.weight_bytes,
        "threads": torch.get_num_threads(),
    }
    (folder / f"counted{rank}.json").write_text(json.dumps(counted))
    pipeline.trace.write(folder, pipeline.facts())


def early(folder: Path, steps: int) -> None:
    """A video without end that is dropped after three blocks, then another on the same pipeline's ranks."""
    model = tiny_wan()
    pipeline = pipeline_of(model)
    video = dict(itertools.islice(draw(folder, pipeline, steps, blocks=None), 3))
    pipeline.close()
    again = pipeline_of(model)
    second = dict(draw(folder, again, steps, scheduler=euler, blocks=2, seed=9))
    if dist.get_rank() == 0:
        torch.save([video, second], folder / "video.pt")


def endless(folder: Path, steps: int, raise_on: int | None = None, every: int = 1) -> None:
    """Runs until a rank dies."""
    pipeline = pipeline_of(tiny_wan())
    rank = dist.get_rank()
    if rank == raise_on:
        run = pipeline.stage.run

        def fail(*args: Any) -> Any:
            if args[1].iteration == 3:
                raise ZeroDivisionError("a bug of this rank")
            return run(*args)

        pipeline.stage.run = fail  # type: ignore[method-assign]
    try:
        for _ in draw(folder, pipeline, steps, blocks=10_000, checkpoint=Checkpoint(folder / "check", every=every)):
            pass
    finally:
        (folder / f"ended{rank}").write_text(str(time.time()))
