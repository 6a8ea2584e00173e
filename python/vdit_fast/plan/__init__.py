"""AttentionPlan, the contract between what decides sparsity and what executes it, and its builders."""

from .builders import dense, from_block_mask, from_classes, from_clusters, from_mask
from .plan import AttentionPlan
from .windows import block_causal, windows3d

for _builder in (dense, from_block_mask, from_clusters, from_mask, windows3d, block_causal, from_classes):
    setattr(AttentionPlan, _builder.__name__, staticmethod(_builder))

__all__ = [
    "AttentionPlan",
    "block_causal",
    "dense",
    "from_block_mask",
    "from_classes",
    "from_clusters",
    "from_mask",
    "windows3d",
]
