"""What the ranks of streaming tests do."""

from __future__ import annotations

from pathlib import Path

import diffusers.models.transformers.transformer_wan
import pytest
import torch
import torch.distributed as dist
from rollouts import chunks_of, clip_of, model_of

from vdit_fast import accelerate
from vdit_fast.parallel import sequence_parallel
from vdit_fast.streaming import SelfForcing

assert diffusers  # imported here, so that forked ranks have it

SETTINGS = SelfForcing(cache_frames=6, timesteps=(1000, 500))
FRAMES = 12


def shared(folder: Path) -> None:
    """A stream whose sequences are shared by the ranks, and one after that which is not."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    with sequence_parallel(handle):
        clip = clip_of(handle, SETTINGS, rest, FRAMES)
        held = handle.stats()["streaming"]["nbytes"]
        with pytest.raises(RuntimeError, match="turns whole sequences"):
            next(chunks_of(handle, SelfForcing(cache_frames=6, store="pre_rope"), rest, 3))
    alone = clip_of(handle, SETTINGS, rest, FRAMES)
    torch.save({"clip": clip, "alone": alone, "held": held}, folder / f"rank{dist.get_rank()}.pt")
