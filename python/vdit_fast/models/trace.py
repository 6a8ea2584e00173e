"""Whether something computed earlier still holds, told without a look at device values: by identity, address and
version of the tensors that it was computed from. Writing through ``.data`` leaves no trace and is not noticed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "Unknown", "identity_of", "trace_of"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")


class Unknown(Exception):
    """Whether a remembered answer still holds cannot be told; the message says why."""


class _Same:
    """A weak reference that equals another one of the same living tensor, whatever the tensors' contents."""

    def __init__(self, tensor: Tensor) -> None:
        self.ref = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        held = self.ref()
        return held is not None and isinstance(other, _Same) and held is other.ref()

    __hash__ = None  # type: ignore[assignment]


def trace_of(modules: Iterable[nn.Module | None]) -> list[Any]:
    """Everything that decides what these modules compute; equal lists mean the same function.

    Weights stand in it as weak references, so that another one at the same address is not taken for them.
    """
    found: list[Any] = []
    for module in modules:
        for part in module.modules() if module is not None else ():
            if "forward" in part.__dict__ or any(part.__dict__.get(name) for name in HOOKS):
                raise Unknown("hooks act on the projections (offloading, casting)")
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is None:
                    continue
                if tensor.device.type == "meta" or tensor.is_inference():
                    raise Unknown("the weights are offloaded or have no version counter")
                found.append((_Same(tensor), tensor.data_ptr(), tensor._version))
            if hasattr(part, "active_adapters"):
                names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
                found.append(repr([getattr(part, name, None) for name in names]))
    return found


def identity_of(tensor: Any) -> tuple[Any, ...] | None:
    """What stays the same while a tensor argument has the same contents, None for no tensor."""
    if tensor is None:
        return None
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type == "meta" or tensor.layout != torch.strided:
        raise Unknown(f"the embeddings are no plain tensor but {type(tensor).__name__}")
    if tensor.is_inference():
        raise Unknown("tensors made in inference mode have no version counter")
    owner = tensor if tensor._base is None else tensor._base
    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor._version)
    return _Same(owner), place
