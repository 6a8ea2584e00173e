"""Planners: one file per sparse-attention method, each turning queries and keys into an AttentionPlan."""

from .adaspa import AdaSpa
from .base import REGISTRY, Decision, Planner, from_dict
from .draft import Draft
from .svg1 import SVG1
from .svg2 import SVG2
from .rettention import Rettention
from .sparse_vdit import SparseVDiT
from .window import Window

__all__ = [
    "REGISTRY",
    "SVG1",
    "SVG2",
    "AdaSpa",
    "Decision",
    "Draft",
    "Planner",
    "Rettention",
    "SparseVDiT",
    "Window",
    "from_dict",
]
