"""What planners are told of one attention call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vdit_fast.context import LayerContext

if TYPE_CHECKING:
    from vdit_fast.models.forward import Forward
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.ledger import LayerLedger
    from vdit_fast.models.session import Session

__all__ = ["layer_context"]


def layer_context(
    session: Session, ledger: LayerLedger, forward: Forward | None, call: HeadsCall
) -> tuple[LayerContext | None, str]:
    """The context of a call, or None and why planners cannot be asked."""
    if forward is None:
        return None, "called outside a forward of its transformer"
    geometry = forward.geometry
    if geometry is None:
        return None, "the transformer's input has no known video grid"
    rest = call.q.shape[1] - geometry.n_video - geometry.history
    if rest < 0 or (geometry.text is not None and rest != geometry.text):
        parts = f"the grid {geometry.grid} plus {geometry.text or 0} text tokens"
        parts += f" plus {geometry.history} of history" if geometry.history else ""
        return None, f"{call.q.shape[1]:,} tokens are not {parts}"
    forward.geometry = replace(geometry, text=rest)
    context = LayerContext(
        layer=ledger.place,
        num_layers=session.planned,
        name=ledger.name,
        grid=geometry.grid,
        n_video=geometry.n_video,
        text=rest + geometry.history,
        text_first=geometry.text_first,
        kv_len=call.kv_len,
        step=forward.step,
        state=session.memory(forward.step.frame_block),
        family=session.family,
        static=session.static,
        heads=call.heads,
    )
    return context, ""
