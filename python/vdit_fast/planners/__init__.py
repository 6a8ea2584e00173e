"""Planners: one file per sparse-attention method, each turning queries and keys into an AttentionPlan."""

from .base import REGISTRY, Decision, Planner, from_dict
from .draft import Draft
from .radial import Radial
from .sliding_tile import SlidingTile
from .sparge import Sparge
from .vsa import VSA
from .window import Window
from .xattention import XAttention

__all__ = [
    "REGISTRY",
    "VSA",
    "Decision",
    "Draft",
    "Planner",
    "Radial",
    "SlidingTile",
    "Sparge",
    "Window",
    "XAttention",
    "from_dict",
]
