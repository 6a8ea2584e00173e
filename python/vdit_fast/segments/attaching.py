"""How further tokens are given to an accelerated model, and taken away again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from vdit_fast.models.blocks import transformer_blocks
from vdit_fast.models.callables import check_arguments
from vdit_fast.models.extra_keys import Captured, Feed, FeedMode, extra_keys, refuse_capture
from vdit_fast.models.memory import Memory, checked_rows, memory_layers
from vdit_fast.models.references import References

if TYPE_CHECKING:
    from vdit_fast.handle import Handle
    from vdit_fast.root import Root

__all__ = ["capture", "set_feed", "set_memory", "set_references"]


def _stop(handle: Handle, name: str) -> None:
    """Let nobody of this name stand around blocks any more."""
    if any(name in root.session.around for root in handle.roots):
        for root in handle.roots:
            root.session.around.pop(name, None)
            root.rewrap()
        handle.reset()


def _place(handle: Handle, name: str, made: list[tuple[Root, Any]]) -> None:
    for root, around in made:
        root.session.around[name] = around
        root.rewrap()
    handle.reset()  # what caches and planners remember was computed without


def _alive(handle: Handle, name: str) -> list[Root]:
    if not handle.active:
        raise RuntimeError(f"{name}: this handle was removed; call vdit_fast.accelerate on the model again")
    roots = [root for root in handle.roots if root.module() is not None]
    if not roots:
        raise RuntimeError(f"{name}: the accelerated model is gone; keep a reference to it")
    return roots


def _finite(name: str, rows: Tensor, argument: str = "rows") -> None:
    """Raise ValueError where a number is none. Reads from the device, once for all forwards."""
    if rows.is_meta:
        return
    rows = rows.detach()
    finite = (rows.float() if rows.itemsize == 1 else rows).isfinite()
    if bool(finite.all()):
        return
    wrong = finite.logical_not().nonzero()
    raise ValueError(
        f"{name}: {argument} {list(rows.shape)}: {len(wrong):,} numbers are not finite, the first at "
        f"{wrong[0].tolist()}; look at what made them"
    )


def set_memory(handle: Handle, rows: Any) -> None:
    """See ``Handle.memory``."""
    if rows is None:
        _stop(handle, "memory")
        return
    roots = _alive(handle, "memory")
    if callable(rows):
        check_arguments("memory", rows, "step")
        source = rows
    else:
        found = checked_rows("memory", rows)
        assert found is not None
        _finite("memory", rows)
        source = found.clone()
    made = []
    for root in roots:
        module = root.module()
        assert module is not None
        _refuse_linear(root, "memory")
        served = [layer.name for layer in root.session.layers]
        layers = memory_layers(root.adapter, transformer_blocks(module, root.adapter), served)
        made.append((root, Memory(source, layers)))
    _place(handle, "memory", made)


def set_references(handle: Handle, rows: Any) -> None:
    """See ``Handle.references``."""
    if rows is None:
        _stop(handle, "references")
        return
    roots = _alive(handle, "references")
    found = checked_rows("references", rows)
    assert found is not None
    _finite("references", rows)
    for root in roots:
        reason = root.adapter.references
        if reason is None and not transformer_blocks(root.module(), root.adapter):  # type: ignore[arg-type]
            reason = "a part without its list of blocks"
        if reason is not None:
            raise RuntimeError(f"references: family {root.adapter.family!r}: {reason}")
    copied = found.clone()
    _place(handle, "references", [(root, References(copied)) for root in roots])


def capture(handle: Handle) -> Captured:
    """See ``Handle.capture``."""
    (root,) = _one(handle, "capture")
    refuse_capture(root.session)
    _refuse_own_linear(root, "capture")
    found = extra_keys(root.session)
    if found.captured is not None:
        found.captured.stop()
    found.captured = Captured(len(root.session.layers), session=root.session)
    return found.captured


def set_feed(handle: Handle, captured: Any, mode: Any, gate: Any) -> None:
    """See ``Handle.feed``."""
    if captured is None:
        feeds = [item for root in handle.roots if (item := root.session.around_heads.get("segments")) is not None]
        if any(getattr(item, "feed", None) is not None for item in feeds):
            for root in handle.roots:
                extra_keys(root.session).feed = None
            handle.reset()
        return
    (root,) = _one(handle, "feed")
    if not isinstance(captured, Captured):
        raise TypeError(f"feed: pass what capture() of another handle returned, got {type(captured).__name__}")
    if mode not in get_args(FeedMode):
        raise ValueError(f"feed: unknown mode {mode!r}; one of {', '.join(map(repr, get_args(FeedMode)))}")
    if captured.session is root.session:
        raise ValueError("feed: these keys are the transformer's own; capture those of another one")
    here = len(root.session.layers)
    if here > captured.layers:
        raise ValueError(
            f"feed: {here} layers cannot take those of the same number from {captured.layers}; feed a model with at "
            "most as many layers"
        )
    gate = _checked_gate(gate, mode)
    _refuse_own_linear(root, "feed")
    if mode == "concat":
        _refuse_linear(root, "feed")
    extra_keys(root.session).feed = Feed(captured, mode, gate)
    handle.reset()


def _checked_gate(gate: Any, mode: str) -> float | Tensor:
    if isinstance(gate, Tensor):
        if gate.ndim > 1 or not gate.is_floating_point():
            raise ValueError(f"feed: gate must be a number or a floating tensor [] or [heads], got {list(gate.shape)}")
        _finite("feed", gate, "gate")
    elif isinstance(gate, bool) or not isinstance(gate, int | float):
        raise TypeError(f"feed: gate must be a number or a tensor [] or [heads], got {type(gate).__name__}")
    elif not math.isfinite(gate):
        raise ValueError(f"feed: gate must be finite, got {gate}")
    else:
        gate = float(gate)
    if mode == "concat" and (isinstance(gate, Tensor) or gate not in (0.0, 1.0)):
        raise ValueError("feed: one softmax over both has no gate; leave it at 1 (0 for none), or take mode='sum'")
    return gate


def _one(handle: Handle, name: str) -> list[Root]:
    roots = _alive(handle, name)
    if len(roots) != 1:
        raise RuntimeError(
            f"{name}: layers are numbered per transformer, and this handle has {len(roots)}; accelerate one"
        )
    return roots


def _refuse_own_linear(root: Root, name: str) -> None:
    if any(layer.own_linear for layer in root.session.layers):
        raise RuntimeError(
            f"{name}: attention of family {root.adapter.family!r} is linear: it has no softmax that further keys enter"
        )


def _refuse_linear(root: Root, name: str) -> None:
    _refuse_own_linear(root, name)
    if any(layer.linear for layer in root.session.layers):
        raise RuntimeError(
            f"{name}: layers of linear attention read the keys of the sequence only and would leave it out; set linear "
            "to null"
        )
