"""Builders of tiny random transformers of the real classes; every file adds its ``BUILDERS``, by a name each."""

from __future__ import annotations

import importlib
import pkgutil

from families.base import Builder

__all__ = ["BUILDERS"]

BUILDERS: dict[str, Builder] = {}
for module in pkgutil.iter_modules(__path__):
    BUILDERS.update(getattr(importlib.import_module(f"{__name__}.{module.name}"), "BUILDERS", {}))
