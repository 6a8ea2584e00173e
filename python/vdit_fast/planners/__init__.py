"""Planners: one file per sparse-attention method, each turning queries and keys into an AttentionPlan."""

from .base import REGISTRY, Decision, Planner, from_dict
from .draft import Draft
from .svg1 import SVG1
from .svg2 import SVG2
from .window import Window

__all__ = [
    "REGISTRY",
    "SVG1",
    "SVG2",
    "Decision",
    "Draft",
    "Planner",
    "Window",
    "from_dict",
]
