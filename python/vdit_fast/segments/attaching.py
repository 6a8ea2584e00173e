"""How further tokens are given to an accelerated model, and taken away again."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from vdit_fast.models.blocks import transformer_blocks
from vdit_fast.models.memory import Memory, checked_rows, memory_layers

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["set_memory"]


def set_memory(handle: Handle, rows: Any) -> None:
    """See ``Handle.memory``."""
    if rows is None:
        if any("memory" in root.session.around for root in handle.roots):
            for root in handle.roots:
                root.session.around.pop("memory", None)
                root.rewrap()
            handle.reset()
        return
    if not handle.active:
        raise RuntimeError("memory: this handle was removed; call vdit_fast.accelerate on the model again")
    if callable(rows):
        _check_arguments(rows)
        source = rows
    else:
        found = checked_rows(rows)
        assert found is not None
        source = found.clone()
    made = []
    for root in handle.roots:
        module = root.module()
        if module is None:
            continue
        if any(layer.linear for layer in root.session.layers):
            raise RuntimeError(
                "memory: layers of linear attention read every key once and would leave it out; set linear to null"
            )
        served = [layer.name for layer in root.session.layers]
        layers = memory_layers(module, root.adapter, transformer_blocks(module, root.adapter), served)
        layout = root.adapter.memory
        assert not isinstance(layout, str)
        made.append((root, Memory(source, layout, root.adapter, layers)))
    for root, memory in made:
        root.session.around["memory"] = memory
        root.rewrap()
    handle.reset()


def _check_arguments(fn: Any) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a callable of C code
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"memory: the function is called with (step): {error}") from None
