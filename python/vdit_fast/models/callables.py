"""Whether functions of the caller's take what they will be called with."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["check_arguments"]


def check_arguments(what: str, fn: Any, *names: str) -> None:
    """Raise TypeError where ``fn`` cannot be called with one positional argument per name."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a callable of C code
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise TypeError(f"{what}: the function is called with ({', '.join(names)}): {error}") from None
