"""Planners: one file per sparse-attention method, each turning queries and keys into an AttentionPlan."""

from .base import REGISTRY, Decision, Planner, from_dict
from .draft import Draft
from .window import Window

__all__ = [
    "REGISTRY",
    "Decision",
    "Draft",
    "Planner",
    "Window",
    "from_dict",
]
