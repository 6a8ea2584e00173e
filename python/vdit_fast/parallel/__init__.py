"""Several processes for one clip, over torch.distributed."""

from __future__ import annotations

from .block_queue import BlockQueue
from .noise import NoisePool
from .sampler import BlockSampler, SchedulerSampler
from .schedule import Schedule, split_layers
from .stages import StagePipeline
from .watch import RankFailed

__all__ = [
    "BlockQueue",
    "BlockSampler",
    "NoisePool",
    "RankFailed",
    "Schedule",
    "SchedulerSampler",
    "StagePipeline",
    "split_layers",
]
