"""Several processes for one clip, over torch.distributed."""

from __future__ import annotations

from .sequence import SequenceParallel, sequence_parallel

__all__ = ["SequenceParallel", "sequence_parallel"]
