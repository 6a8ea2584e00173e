"""Planners: one file per sparse-attention method, each turning queries and keys into an AttentionPlan."""

from .base import REGISTRY, Decision, Planner, from_dict
from .draft import Draft
from .sparse_vdit import SparseVDiT
from .window import Window

__all__ = [
    "REGISTRY",
    "Decision",
    "Draft",
    "Planner",
    "SparseVDiT",
    "Window",
    "from_dict",
]
