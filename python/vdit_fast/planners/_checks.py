"""Checks of planner settings: every error names the setting, its value and what would be right."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable
from typing import Any


def count(name: str, value: Any, *, least: int = 0) -> int:
    """An integer ≥ least; bool and float are refused, numpy integers are taken."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer ≥ {least}, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}")
    return number


def fraction(name: str, value: Any) -> float:
    """A finite number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be a finite number in [0, 1), got {value!r}")
    return float(value)


def counts(name: str, value: Any, length: int, *, least: int = 1) -> tuple[int, ...]:
    """A tuple (or list, as a config file gives it) of exactly `length` integers ≥ least."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {length} integers ≥ {least}, got {value!r}")
    items = tuple(value)
    if len(items) != length:
        raise ValueError(f"{name} must be {length} integers ≥ {least}, got {len(items)} of them: {value!r}")
    return tuple(count(f"{name}[{i}]", item, least=least) for i, item in enumerate(items))


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def switch(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def number(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number in [least, most]; bool is refused."""
    if least > -math.inf and most < math.inf:
        bound = f" between {least:g} and {most:g}"
    else:
        bound = "".join([f" ≥ {least:g}"] * (least > -math.inf) + [f" ≤ {most:g}"] * (most < math.inf))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a finite number{bound}, got {value!r}")
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def schedule(name: str, value: Any) -> tuple[int, ...] | tuple[float, ...]:
    """Increasing denoising steps: all step ids (integers ≥ 0) or all fractions of the schedule (floats in [0, 1))."""
    if not isinstance(value, list | tuple) or not value:
        raise TypeError(f"{name} must list step ids or fractions of the schedule, such as (10, 30), got {value!r}")
    fractions = any(isinstance(item, float) for item in value)
    items: list[Any] = []
    for i, item in enumerate(value):
        label = f"{name}[{i}]"
        if fractions and not isinstance(item, float) and item != 0:
            raise TypeError(f"{name} must hold step ids (int) or fractions (float), not both, got {value!r}")
        items.append(fraction(label, item) if fractions else count(label, item))
    if any(b <= a for a, b in itertools.pairwise(items)):
        raise ValueError(f"{name} must increase, got {value!r}")
    return tuple(items)
