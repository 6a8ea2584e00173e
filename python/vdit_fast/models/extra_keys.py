"""Further keys and values that the attention of a transformer reads beside its own sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.session import Session

__all__ = ["ExtraKeys", "extra_keys"]


class ExtraKeys:
    """Innermost around attention: whatever exchanges the sequence further out, every query reads these keys once."""

    def __init__(self) -> None:
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        """Of the block that is running, by layer."""
        self.read: set[int] = set()
        """Layers whose attention has read them."""

    def fresh(self) -> ExtraKeys:
        return ExtraKeys()

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        pair = self.memory.get(call.layer)
        if pair is None:
            return proceed()
        self.read.add(call.layer)
        given = call.segments
        call.segments = [*given, _fitting(call, *pair)]
        try:
            return proceed()
        finally:
            call.segments = given  # whoever stands further out may go on more than once


def _fitting(call: HeadsCall, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast attention runs in another dtype than the projections may."""
    return k.to(call.k.dtype), v.to(call.k.dtype)


def extra_keys(session: Session) -> ExtraKeys:
    """The session's, made where there is none."""
    found = session.around_heads.setdefault("segments", ExtraKeys())
    assert isinstance(found, ExtraKeys)
    return found
