"""What tells one run from another: short digests of models, weights and arguments."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["described", "digest", "model_digest", "other_weights", "weight_digests"]

SAMPLES = 64
"""Values of a parameter that are looked at, evenly spread."""


def digest(value: Any) -> str:
    """16 hexadecimal digits of a nest of dicts, lists and tuples; tensors count by dtype, shape and bytes, other
    objects than numbers and strings by their class."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()[:16]


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {list(value.shape)}".encode())
        found.update(_bytes(value).cpu().numpy().tobytes())
    elif isinstance(value, dict):
        found.update(f"dict {len(value)}".encode())
        for key in sorted(value, key=str):
            _feed(found, str(key))
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)}".encode())
        for item in value:
            _feed(found, item)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        found.update(f"{value!r};".encode())
    else:
        found.update(f"{type(value).__qualname__};".encode())


def _bytes(x: Tensor) -> Tensor:
    """uint8 [values, itemsize], of any dtype."""
    return x.detach().contiguous().view(-1).view(torch.uint8).view(x.numel(), x.element_size())


def described(part: Any) -> str:
    """The ``description`` of a packing or sampler; the class where it has none."""
    return str(getattr(part, "description", type(part).__qualname__))


def model_digest(module: nn.Module) -> str:
    """Class, configuration, and names, shapes and dtypes of the parameters; where they are does not matter."""
    config = dict(getattr(module, "config", None) or {})
    kinds = {name: [list(p.shape), str(p.dtype)] for name, p in module.named_parameters()}
    own = {key: item for key, item in config.items() if not key.startswith("_")}
    return f"{type(module).__name__} {digest([own, kinds])}"


def weight_digests(module: nn.Module) -> dict[str, str]:
    """Of some values of every parameter that is there: those on "meta" and of tensor subclasses are left out."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta" and type(parameter.data) is Tensor and parameter.numel():
            count = parameter.numel()
            places = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).round().long()
            found[name] = digest(_bytes(parameter)[places.to(parameter.device)])
    return found


def other_weights(a: dict[str, str], b: dict[str, str]) -> str | None:
    """Which parameters differ among those that both have; None: none does."""
    names = [name for name in a if name in b and a[name] != b[name]]
    return f"{len(names)} parameters, the first is {names[0]}" if names else None
