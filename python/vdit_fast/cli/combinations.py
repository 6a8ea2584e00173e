"""The configurations that ``vdit-fast bench combinations`` compares: every part alone, and parts together.

Pools and blocks fit the demo model's frames of 16 x 16 tokens.
"""

from __future__ import annotations

from typing import Any

_SPARSE = {"method": "svg1", "sparsity": 0.74, "block": 64, "dense_steps": 0.25, "dense_layers": 0}
_DRAFT = {"method": "draft", "sparsity": 0.75, "pool": [4, 8], "dense_steps": 0.25, "dense_layers": 0}
_CACHE = {"method": "taylorseer", "first_full": 0.25, "interval": 2}

COMBINATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense kernel": ("kernels", {"fuse": "off"}),
    "dense kernel, fused": ("kernels", {}),
    "svg1": ("sparse", {"attention": _SPARSE}),
    "draft": ("sparse", {"attention": _DRAFT}),
    "taylorseer": ("cache", {"cache": _CACHE}),
    "svg1 + taylorseer": ("combined", {"attention": _SPARSE, "cache": _CACHE}),
    "draft + taylorseer": ("combined", {"attention": _DRAFT, "cache": _CACHE}),
}
"""Name -> (group, configuration)."""
