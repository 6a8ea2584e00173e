"""The known model families. A family is one file of this folder that calls ``register``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

import vdit_fast.models as package
from vdit_fast.models.base import ModelAdapter

__all__ = ["adapter_for", "adapters", "register"]

_adapters: dict[str, ModelAdapter] = {}


def register(adapter: ModelAdapter) -> ModelAdapter:
    """Add a family. Raises ValueError when another family already serves one of its processors."""
    for other in _adapters.values():
        shared = other.known() & adapter.known()
        if shared and other.family != adapter.family:
            raise ValueError(f"processors {sorted(shared)} of family {adapter.family!r} belong to {other.family!r}")
    _adapters[adapter.family] = adapter
    return adapter


@functools.cache
def _load() -> None:
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def adapters() -> tuple[ModelAdapter, ...]:
    """All families, sorted by name."""
    _load()
    return tuple(_adapters[family] for family in sorted(_adapters))


def adapter_for(processor: Any) -> ModelAdapter | None:
    """The family that knows this stock processor, None when none does."""
    return next((adapter for adapter in adapters() if adapter.matches(processor)), None)
