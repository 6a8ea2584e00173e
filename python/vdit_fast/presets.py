"""Presets by intent, as plain dicts in the form ``Config.from_dict`` takes.

Constants instead of data files: the core needs neither PyYAML nor package data to use them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

PRESETS: dict[str, dict[str, Any]] = {
    # Dense attention through this package's kernel: same answers as the stock model up to rounding.
    "exact": {},
    # Students of few steps have nothing to forecast from: shorter schedules run without a cache.
    # The first third of the steps and the first layer decide the layout of a video: keep them dense and computed.
    "balanced": {
        "attention": {
            "method": "draft",
            "sparsity": 0.75,
            "dense_steps": 0.34,
            "dense_layers": 1,
            "min_tokens": 4096,
        },
        "cache": {"method": "taylorseer", "first_full": 0.34, "interval": 2, "min_steps": 9},
    },
    "fast": {
        "attention": {
            "method": "draft",
            "sparsity": 0.9,
            "dense_steps": 0.1,
            "dense_layers": 1,
            "min_tokens": 4096,
        },
        "cache": {"method": "taylorseer", "first_full": 0.2, "interval": 3, "min_steps": 9},
    },
}
