"""Plans that are built once and read by many forwards."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch

__all__ = ["remembered"]

T = TypeVar("T")


def remembered(held: MutableMapping[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """What ``held`` has under a key, made where it has nothing; never of inference tensors, which a later forward that
    records gradients could not save."""
    if key not in held:
        with torch.inference_mode(False):
            held[key] = make()
    found: T = held[key]
    return found
