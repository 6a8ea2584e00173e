"""How a function becomes a hook of an accelerated model, and how it is taken out again."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vdit_fast.models.hooks import WHERE, Entry, HookFn, choose

if TYPE_CHECKING:
    from vdit_fast.handle import Handle
    from vdit_fast.root import Root

__all__ = ["HookRemover", "Layers", "add_hook"]

Layers = int | str | Iterable[int | str] | None
"""Indices or patterns of module paths; None is all."""


class HookRemover:
    """Takes one hook out again when it is called, or at the end of a ``with`` block. Safe to call again."""

    def __init__(self, placed: list[tuple[Root, Entry]]) -> None:
        self._placed = placed

    @property
    def names(self) -> list[str]:
        """Module paths that are hooked."""
        found = []
        for root, entry in self._placed:
            found += [name for index, name in root.candidates(entry.where) if index in entry.chosen]
        return found

    def __call__(self) -> None:
        for root, entry in self._placed:
            if entry in root.session.hooks.entries:  # Handle.remove takes all out
                root.session.hooks.entries.remove(entry)
                root.rehook()
        self._placed = []

    def __enter__(self) -> HookRemover:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()


def add_hook(handle: Handle, where: str, fn: HookFn, layers: Any) -> HookRemover:
    """See ``Handle.hook``."""
    if where not in WHERE:
        raise ValueError(f"hook: unknown place {where!r}; one of {', '.join(map(repr, WHERE))}")
    if not callable(fn):
        raise TypeError(f"hook: fn must be a function of (step, place, rows), got {type(fn).__name__}")
    belongs = getattr(fn, "where", where)
    if belongs != where:
        raise ValueError(f"hook: {type(fn).__name__} belongs at {belongs!r}, not at {where!r}")
    if not handle.active:
        raise RuntimeError("hook: this handle was removed; call vdit_fast.accelerate on the model again")
    layers = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
    found = [(root, root.candidates(where)) for root in handle.roots if root.module() is not None]
    if not any(names for _, names in found):
        families = ", ".join(sorted({root.adapter.family for root, _ in found}))
        what = "blocks that follow one another" if where == "block_output" else "served self-attention"
        raise RuntimeError(f"hook: the family {families!r} has no {what}; hook another place than {where!r}")
    for item in layers if isinstance(layers, list) else ():
        if not any(choose(names, [item]) for _, names in found):
            raise ValueError(f"hook: {item!r} in layers names none of the places at {where!r}")
    placed = [(root, Entry(where, fn, choose(names, layers))) for root, names in found]
    placed = [(root, entry) for root, entry in placed if entry.chosen]
    if not placed:
        listed = ", ".join(f"{index} {name}" for _, names in found for index, name in names[:4])
        count = sum(len(names) for _, names in found)
        raise ValueError(f"hook: layers {layers!r} name none of the {count} places at {where!r} ({listed}, ...)")
    for root, entry in placed:
        root.session.hooks.entries.append(entry)
        root.rehook()
    return HookRemover(placed)
