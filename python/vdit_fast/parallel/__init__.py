"""Several processes for one clip: stage pipelines, sequence and guidance parallelism over torch.distributed."""

from __future__ import annotations

from .block_queue import BlockQueue
from .guidance import GuidanceParallel, guidance_parallel
from .noise import NoisePool
from .sampler import BlockSampler, SchedulerSampler
from .schedule import Schedule, split_layers
from .sequence import SequenceParallel, sequence_parallel
from .stages import StagePipeline
from .watch import RankFailed

__all__ = [
    "BlockQueue",
    "BlockSampler",
    "GuidanceParallel",
    "NoisePool",
    "RankFailed",
    "Schedule",
    "SchedulerSampler",
    "SequenceParallel",
    "StagePipeline",
    "guidance_parallel",
    "sequence_parallel",
    "split_layers",
]
