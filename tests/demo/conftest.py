"""A tiny random transformer of the demo's kind."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.demo.architecture import TRANSFORMER_CONFIG

TINY = TRANSFORMER_CONFIG | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}


@pytest.fixture
def tiny() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(**TINY).eval().requires_grad_(False)
