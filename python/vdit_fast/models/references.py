"""Reference rows in the text stream of a joint sequence: they enter behind the text at the first block and leave after
the last (GSFixer, arXiv 2508.09667)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, cat

from vdit_fast.models.blocks import streams, with_streams

if TYPE_CHECKING:
    from vdit_fast.models.blocks import BlockCall

__all__ = ["References"]


class References:
    """Stands around the blocks of one transformer, outside of all others: these see a longer text.

    Args:
        rows: [1 or B, R, C] of the blocks' width.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def fresh(self) -> References:
        return References(self.rows)

    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        block, session = call.block, call.session
        stream = block.streams[1]
        if block.index == 0:
            tensors = (value for value in call.arguments.values() if isinstance(value, Tensor))
            forward = session.forward_among(tensors)
            text = call.arguments[stream]
            joint = self._behind(text, block.name)
            call.arguments[stream] = joint
            if forward is not None and forward.geometry is not None:
                forward.geometry = replace(forward.geometry, text=joint.shape[1])
        output = proceed()
        if block.index < block.count - 1:
            return output
        video, text = streams(output)
        return with_streams(output, (video, text[:, : text.shape[1] - self.rows.shape[1]]))

    def _behind(self, text: Tensor, name: str) -> Tensor:
        rows = self.rows
        if rows.shape[-1] != text.shape[-1] or rows.shape[0] not in (1, text.shape[0]):
            raise ValueError(
                f"references: rows are {list(rows.shape)}, the text of {name} is {list(text.shape)}; pass "
                f"[R, {text.shape[-1]}] or [{text.shape[0]}, R, {text.shape[-1]}]"
            )
        return cat([text, rows.to(text).expand(text.shape[0], -1, -1)], dim=1)
