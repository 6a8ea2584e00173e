"""JSON in and out for reports: strict JSON (no NaN or Infinity tokens), tensors and arrays accepted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch


def json_safe(value: Any, digits: int | None = None) -> Any:
    """A copy of ``value`` made of plain JSON types.

    Infinite numbers become the strings ``"inf"`` and ``"-inf"`` (``float()`` reads them back) and NaN becomes ``None``,
    because strict JSON has no token for them. Paths keep only their file name, so that no report leaks a directory.
    ``digits`` rounds floats. Raises TypeError for a type that has no JSON form.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return value if digits is None else round(value, digits)
    if isinstance(value, torch.Tensor):
        return json_safe(
            value.detach().cpu().double().tolist() if value.is_floating_point() else value.tolist(), digits
        )
    if isinstance(value, (np.ndarray, np.generic)):
        return json_safe(value.tolist(), digits)
    if isinstance(value, PurePath):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return json_safe(asdict(value), digits)
    if isinstance(value, Mapping):
        return {str(key): json_safe(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [json_safe(item, digits) for item in items]
    raise TypeError(f"cannot write a {type(value).__name__} as JSON; pass numbers, strings, lists, dicts or tensors")


def _pretty(value: Any, pad: str = "") -> str:
    """Indented JSON with each list of plain values on one line: long series stay readable and small."""
    inner = pad + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {_pretty(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{pad}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{pad}]"
    return json.dumps(value, allow_nan=False, separators=(",", ": "))


def write_json(path: str | Path, value: Any, digits: int | None = None) -> Path:
    """Writes ``json_safe(value)`` to ``path`` (folders are made) and returns the path."""
    path = Path(path)
    text = _pretty(json_safe(value, digits))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_json(path: str | Path) -> Any:
    """The value stored in ``path``. Raises FileNotFoundError, or ValueError for a file that is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.name} is not a JSON file ({error}); pass a file written by vdit_fast.report"
        ) from error
