"""Layers that compute only what a router chose: attention heads, hidden groups, tokens, experts."""

from .apply import DyDiTHandle, apply_dydit
from .experts import ExpertGroups, GroupedExperts, SwiGLU, group_by_expert, grouped_experts, route
from .layers import BlockWidth, DyDiTBlock, DynamicAttention, DynamicMlp
from .layout import Layout
from .routers import TokenRouter, WidthRouter, width_masks
from .tokens import TokenSubset
from .units import Units

__all__ = [
    "BlockWidth",
    "DyDiTBlock",
    "DyDiTHandle",
    "DynamicAttention",
    "DynamicMlp",
    "ExpertGroups",
    "GroupedExperts",
    "Layout",
    "SwiGLU",
    "TokenRouter",
    "TokenSubset",
    "Units",
    "WidthRouter",
    "apply_dydit",
    "group_by_expert",
    "grouped_experts",
    "route",
    "width_masks",
]
