"""What operators do where autograd cannot follow them: in neither direction is a gradient dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("vdit_fast", "IMPL")


def carries_no_gradient(*names: str) -> None:
    """Results of these operators never require a gradient, whatever their inputs do: autograd does not see the call."""
    for name in names:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def has_tangent(*tensors: Any) -> bool:
    """Whether one of these is being differentiated forwards, as by ``torch.func.jvp``. Torch drops the tangents of
    operators from libraries without a word."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in _flat(tensors))


def needs_gradient(*tensors: Any) -> bool:
    """Whether autograd must see what becomes of these, backwards or forwards; lists are looked into, None and the like
    do not count."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in _flat(tensors)):
        return True
    return has_tangent(*tensors)


def _flat(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _flat(one)


def refuse_tangents(name: str, *tensors: Any) -> None:
    """For operators with a gradient, but without a forward derivative.

    Raises:
        RuntimeError: one of the tensors is being differentiated forwards.
    """
    if has_tangent(*tensors):
        raise RuntimeError(
            f"vdit_fast: {name} has no forward-mode derivative (torch.func.jvp); use reverse mode or plain torch there"
        )


def refuses_gradients(name: str, instead: str) -> None:
    """A call of this operator that autograd would have to record is an error; `instead` says what to call. What it
    writes to counts as changed, so that a backward pass that saved it before complains."""
    operator = getattr(torch.ops.vdit_fast, name).default
    written = [
        i for i, a in enumerate(operator._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]

    def refuse(*arguments: Any) -> Any:
        if needs_gradient(*arguments):
            raise RuntimeError(f"vdit_fast::{name} has no gradient; call it under torch.no_grad(), or call {instead}")
        with torch._C._AutoDispatchBelowAutograd():
            result = operator(*arguments)
        torch.autograd.graph.increment_version([a for i in written if isinstance(a := arguments[i], Tensor)])
        return result

    _LIBRARY.impl(name, refuse, "Autograd")
