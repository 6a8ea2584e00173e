"""Checks of a policy's knobs; every message names the knob, its value and what would be right."""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {"": 1} | {f"{p}B": 1000**i for i, p in enumerate(("", "K", "M", "G", "T"))}
_UNITS |= {f"{p}iB": 1024**i for i, p in enumerate(("K", "M", "G", "T"), 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def count(knob: str, value: Any, least: int) -> None:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{knob} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{knob} must be at least {least}, got {value}")


def part_or_count(knob: str, value: Any) -> None:
    """A number of steps, or a fraction of them."""
    if not isinstance(value, float):
        count(knob, value, 0)
    elif not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(
            f"{knob} must be an int (number of steps) or a float in [0, 1) (fraction of the steps), got {value!r}"
        )


def number(knob: str, value: Any, least: float, most: float = math.inf) -> None:
    """A finite number in [least, most]."""
    wanted = f"in [{least:g}, {most:g}]" if math.isfinite(most) else f"of at least {least:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{knob} must be a number {wanted}, got {value!r}")
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{knob} must be a finite number {wanted}, got {value}")


def optional_fraction(knob: str, value: Any) -> None:
    """A number in [0, 1], or None."""
    if value is not None:
        number(knob, value, 0, 1)


def choice(knob: str, value: Any, known: tuple[str, ...]) -> None:
    """One of some words."""
    if value not in known:
        raise ValueError(f"{knob} is {value!r}; expected {' or '.join(map(repr, known))}")


def switch(knob: str, value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{knob} must be true or false, got {value!r}")


def size(knob: str, value: Any) -> int:
    """Bytes, from an integer or from text such as "8 GB" (1000³) or "512 MiB" (1024²)."""
    if not isinstance(value, str):
        count(knob, value, 0)
        return int(value)
    found = _SIZE.fullmatch(value)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f'{knob} is {value!r}; expected a number of bytes, or text such as "8 GB" or "512 MiB"')
    return int(float(found[1]) * units[found[2].lower()])


def block_range(knob: str, value: Any) -> tuple[int, int | None]:
    """[first, end) of blocks as a tuple."""
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    whole = [isinstance(item, int) and not isinstance(item, bool) for item in pair]
    if len(pair) != 2 or not whole[0] or not (whole[1] or pair[1] is None):
        raise TypeError(f"{knob} must be two block numbers [first, end), the second perhaps null, got {value!r}")
    return pair[0], pair[1]


def resolved(knob: str, value: tuple[int, int | None], blocks: int) -> tuple[int, int]:
    """[first, end) in a transformer with so many blocks."""
    first, end = value[0], blocks if value[1] is None else value[1]
    first, end = (item + blocks if item < 0 else item for item in (first, end))
    if not 0 <= first < end <= blocks:
        raise ValueError(f"{knob} {list(value)} leaves no blocks of a transformer with {blocks} blocks")
    return first, end
