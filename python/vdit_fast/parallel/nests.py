"""Tensors in nests of lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["mapped", "tensors"]


def mapped(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """A nest of lists, tuples and dicts with its tensors exchanged."""
    if isinstance(value, Tensor):
        return of(value)
    if isinstance(value, dict):
        return {key: mapped(item, of) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, of) for item in value)
    return value


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nest, in the order in which ``mapped`` comes to them."""
    found: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(value, seen)
    return found
