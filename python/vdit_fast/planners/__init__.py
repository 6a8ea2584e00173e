"""Planners: one file per sparse-attention method, each turning queries and keys into an AttentionPlan."""

from .adaspa import AdaSpa
from .base import REGISTRY, Decision, Planner, from_dict
from .draft import Draft
from .radial import Radial
from .rettention import Rettention
from .shifted_window import ShiftedWindow
from .sliding_tile import SlidingTile
from .sparge import Sparge
from .sparse_vdit import SparseVDiT
from .svg1 import SVG1
from .svg2 import SVG2
from .vsa import VSA
from .window import Window
from .xattention import XAttention

__all__ = [
    "REGISTRY",
    "SVG1",
    "SVG2",
    "VSA",
    "AdaSpa",
    "Decision",
    "Draft",
    "Planner",
    "Radial",
    "Rettention",
    "ShiftedWindow",
    "SlidingTile",
    "Sparge",
    "SparseVDiT",
    "Window",
    "XAttention",
    "from_dict",
]
