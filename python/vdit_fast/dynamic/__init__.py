"""Layers that compute only what a router chose: attention heads, hidden groups, tokens, experts."""

from .experts import ExpertGroups, GroupedExperts, SwiGLU, group_by_expert, grouped_experts, route

__all__ = ["ExpertGroups", "GroupedExperts", "SwiGLU", "group_by_expert", "grouped_experts", "route"]
