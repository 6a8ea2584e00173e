"""Operators whose results carry no gradient."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("vdit_fast", "IMPL")


def carries_no_gradient(*names: str) -> None:
    """Results of these operators never require a gradient, whatever their inputs do: autograd does not see the call."""
    for name in names:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
