"""Several processes for one clip: stage pipelines, sequence and guidance parallelism over torch.distributed."""

from __future__ import annotations

from .guidance import GuidanceParallel, guidance_parallel
from .sequence import SequenceParallel, sequence_parallel

__all__ = ["GuidanceParallel", "SequenceParallel", "guidance_parallel", "sequence_parallel"]
