"""What the builders of tiny random transformers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

__all__ = ["Builder", "Built", "from_diffusers", "sharpen"]

Built = tuple[nn.Module, dict[str, Any]]
"""A model and the arguments of one forward."""
Builder = Callable[..., Built]


def from_diffusers(name: str) -> Any:
    """A class of diffusers that its oldest supported version may lack: the test is skipped then."""
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return found


def sharpen(model: nn.Module) -> nn.Module:
    """Random weights give near-uniform attention, in which a lost RoPE or mask would hardly show."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")) and "weight" in name:
            parameter.data.mul_(1.7).add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
