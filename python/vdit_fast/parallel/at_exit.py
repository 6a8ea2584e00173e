"""What must be closed before the interpreter ends: then daemon threads stand still, and nobody answers a wait."""

from __future__ import annotations

import atexit
import itertools
import sys
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

__all__ = ["close_at_exit", "closed_at_exit"]


class _Closes(Protocol):
    def close(self) -> None: ...


_open: WeakValueDictionary[int, _Closes] = WeakValueDictionary()
_number = itertools.count()

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")


def close_at_exit(thing: _Closes) -> None:
    """Close it when the process ends, if it still exists; what was made last is closed first."""
    _open[next(_number)] = thing


def closed_at_exit(
    make: Callable[Arguments, Generator[Item, Any, Any]],
) -> Callable[Arguments, Generator[Item, Any, Any]]:
    """A generator function whose generators are closed at the end of the process where they were left half-way."""

    @wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Generator[Item, Any, Any]:
        new = make(*args, **kwargs)
        close_at_exit(new)
        return new

    return made


@atexit.register
def _close_all() -> None:
    for thing in reversed(list(_open.values())):
        try:
            thing.close()
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
