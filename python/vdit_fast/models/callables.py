"""Whether what the caller passes is of the kind that it will be used as."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["check_arguments", "check_handle"]


def check_handle(what: str, handle: Any) -> None:
    """Raise TypeError where ``handle`` is no handle, most likely the model itself."""
    if not hasattr(handle, "roots"):
        raise TypeError(
            f"{what}: handle is a {type(handle).__name__}; pass the handle that vdit_fast.accelerate(model) returns"
        )


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
