"""Contexts and inputs for planner tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vdit_fast.context import LayerContext, StepContext


def _context(grid: tuple[int, int, int], text: int = 0, **kwargs: object) -> LayerContext:
    fields: dict = {"layer": 0, "num_layers": 4, "name": "blocks.0.attn", "step": StepContext(step=0, num_steps=10)}
    return LayerContext(grid=grid, text=text, **{**fields, "n_video": math.prod(grid), **kwargs})


def _smooth(grid: tuple[int, int, int], heads: int, dim: int, gain: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, N, heads, dim]: low-frequency waves plus noise; near tokens are alike, and so are q and k."""
    rng = torch.Generator().manual_seed(seed)
    axes = [torch.arange(n, dtype=torch.float32) / 8 for n in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    frequency = torch.randn(heads, 3, dim, generator=rng) * 2
    wave = torch.cos(torch.einsum("na,had->nhd", place, frequency) + torch.rand(heads, dim, generator=rng) * 6)
    q, k, v = (wave + 0.3 * torch.randn(wave.shape, generator=rng) for _ in range(3))
    return (gain * q)[None], (gain * k)[None], v[None]


@pytest.fixture
def context() -> Callable[..., LayerContext]:
    """context(grid, text=0, **fields) -> LayerContext of step 0 of 10, layer 0 of 4."""
    return _context


@pytest.fixture
def smooth() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """smooth(grid, heads, dim, gain, seed) -> q, k, v [1, N, heads, dim] as structured as a video's."""
    return _smooth
