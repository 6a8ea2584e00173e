"""Operators whose results carry no gradient."""

from __future__ import annotations

from typing import Any

import torch

_LIBRARY = torch.library.Library("vdit_fast", "IMPL")


def carries_no_gradient(*names: str) -> None:
    """Results of these operators never require a gradient, whatever their inputs do: autograd does not see the call."""
    for name in names:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def refuses_gradients(name: str, instead: str) -> None:
    """A call of this operator that autograd would have to record is an error; `instead` says what to call."""
    operator = getattr(torch.ops.vdit_fast, name).default

    def refuse(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            raise RuntimeError(f"vdit_fast::{name} has no gradient; call it under torch.no_grad(), or call {instead}")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    _LIBRARY.impl(name, refuse, "Autograd")
