"""Named methods (planners, cache policies) and their mapping form, {"method": name, knob: value, ...}."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def enter(registry: dict[str, type[T]], cls: type[T], kind: str) -> None:
    """Enter a class into its registry by its ``name``; one without a name of its own is abstract."""
    name = cls.__dict__.get("name")
    if not name:
        return
    known = registry.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{kind} name {name!r} is already taken by {known.__qualname__}; choose another")
    registry[name] = cls


def build(registry: Mapping[str, type[T]], data: Mapping[str, Any], kind: str, example: str) -> T:
    """Make the method that ``data`` describes.

    Raises:
        ValueError: no "method", or an unknown method or knob (the message names the nearest one), or a bad value.
        TypeError: ``data`` is not a mapping, or a knob has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a {kind} is described by a mapping like {example}, got {data!r}")
    knobs = dict(data)
    method = knobs.pop("method", None)
    if method is None:
        raise ValueError(f'the {kind} needs a "method": one of {", ".join(sorted(registry))}')
    cls = registry.get(method) if isinstance(method, str) else None
    if cls is None:
        raise ValueError(f"unknown {kind} method {method!r}: {_nearest(method, sorted(registry))}")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in knobs:
        if key not in known:
            raise ValueError(f"{kind} {method!r} has no knob {key!r}: {_nearest(key, known)}")
    return cls(**knobs)


def to_mapping(method: Any) -> dict[str, Any]:
    """{"method": name, knob: value, ...} in plain JSON/YAML types; ``build`` reads it back."""
    knobs = {f.name: getattr(method, f.name) for f in fields(method)}
    return {"method": method.name, **{key: list(v) if isinstance(v, tuple) else v for key, v in knobs.items()}}


def _nearest(word: Any, known: list[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}? known: {', '.join(known)}" if close else "none is known"
