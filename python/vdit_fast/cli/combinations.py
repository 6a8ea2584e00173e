"""The configurations that ``vdit-fast bench combinations`` compares: every part alone, and parts together.

Pools and blocks fit the demo model's frames of 16 x 16 tokens.
"""

from __future__ import annotations

from typing import Any

_SVG1 = {"method": "svg1", "sparsity": 0.74, "block": 64, "dense_steps": 0.25, "dense_layers": 0}
_DRAFT = {"method": "draft", "sparsity": 0.75, "pool": [4, 8], "dense_steps": 0.25, "dense_layers": 0}
_SLOW = {"method": "taylorseer", "first_full": 0.25, "interval": 2}
_QUICK = {"method": "taylorseer", "first_full": 0.25, "interval": 3}

COMBINATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense kernel": ("kernels", {"fuse": "off"}),
    "dense kernel, fused": ("kernels", {}),
    "svg1": ("sparse", {"attention": _SVG1}),
    "draft": ("sparse", {"attention": _DRAFT}),
    "taylorseer /2": ("cache", {"cache": _SLOW}),
    "taylorseer /3": ("cache", {"cache": _QUICK}),
    "taylorseer /3, span": ("cache", {"cache": _QUICK | {"granularity": "span"}}),
    "taylorseer /3, module": ("cache", {"cache": _QUICK | {"granularity": "module"}}),
    "delta_dit": ("cache", {"cache": {"method": "delta_dit", "first_full": 0.25, "interval": 2}}),
    "first_block": ("cache", {"cache": {"method": "first_block", "first_full": 0.25, "threshold": 0.2}}),
    "teacache": ("cache", {"cache": {"method": "teacache", "first_full": 0.25, "threshold": 0.2}}),
    "ras": ("subset", {"subset": {"method": "ras", "sample_ratio": 0.5, "reset": [8]}}),
    "svg1 + taylorseer /2": ("combined", {"attention": _SVG1, "cache": _SLOW}),
    "svg1 + taylorseer /3": ("combined", {"attention": _SVG1, "cache": _QUICK}),
    "draft + taylorseer /3": ("combined", {"attention": _DRAFT, "cache": _QUICK}),
    "svg1 + taylorseer /3, span": ("combined", {"attention": _SVG1, "cache": _QUICK | {"granularity": "span"}}),
    "svg1 + first_block": (
        "combined",
        {"attention": _SVG1, "cache": {"method": "first_block", "first_full": 0.25, "threshold": 0.2}},
    ),
}
"""Name -> (group, configuration). "/2": every second step is computed after the first quarter."""
