"""Inputs of the K/V cache tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast.streaming import KVCache

sys.path.insert(0, str(Path(__file__).parent.parent / "accelerate"))  # for the families' builders

SIZES = {"layers": 2, "page": 5, "batch": 2, "heads": 2, "head_dim": 16}


@pytest.fixture
def cache() -> Callable[..., KVCache]:
    """A cache of small sizes, float32 unless said otherwise."""

    def make(capacity: int, **options: Any) -> KVCache:
        return KVCache(capacity=capacity, **{"dtype": torch.float32} | SIZES | options)

    return make


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """[batch, frames * page, heads, head_dim], random."""

    def make(frames: int, heads: int = SIZES["heads"], *, page: int = SIZES["page"], batch: int = 2) -> Tensor:
        return torch.randn(batch, frames * page, heads, SIZES["head_dim"])

    return make
