"""The frames that a block sees behind itself: its noisier neighbour's first ones, as keys and values of every layer.

The noisier block has passed the same rank just before, so nothing is sent. Its keys are kept after norm and RoPE, at
the positions that they have behind the cleaner block: they are the same for every block, and one pass over a few frames
makes them once. The cleaner block reads them as a segment, which planners do not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vdit_fast.models.base import ServedProcessor
from vdit_fast.models.heads import HeadsCall
from vdit_fast.models.qk import Heads, Norms, Rotary, turn, turn_keys

__all__ = ["NeighbourKeys"]


class NeighbourKeys:
    """Stands around the attention of one rank's blocks, once before RoPE and once around the kernel.

    Args:
        rows: tokens of the frames that the cleaner block sees.
        rotary: of these tokens behind a block.
        layers: the rank's attention layers.
    """

    def __init__(self, rows: int, rotary: Rotary, layers: frozenset[int]) -> None:
        self._rows = rows
        self._rotary = rotary
        self._layers = layers
        self._start: int | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._new: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held now: ``2 · layers · B · rows · C · itemsize`` between two blocks."""
        return sum(x.numel() * x.element_size() for pair in self._kept.values() for x in pair)

    def fresh(self) -> NeighbourKeys:
        return NeighbourKeys(self._rows, self._rotary, self._layers)

    def begin(self, start: int, newest: bool) -> None:
        """A block comes: its own frames begin at row ``start``; the newest one has no noisier neighbour."""
        self._start = start
        if newest:
            self._kept.clear()

    def end(self) -> None:
        """The block has passed.

        Raises:
            RuntimeError: attention of a layer was not served, so that its keys are not known.
        """
        self._start = None
        missing = self._layers - set(self._kept)
        if missing:
            raise RuntimeError(
                f"num_cat: attention of {len(missing)} layers was not served, the first is layer {min(missing)}, so "
                "that blocks cannot see their noisier neighbour; see the fallbacks in report(), or set num_cat to 0"
            )

    def rotate(
        self, processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, across: bool
    ) -> Heads:
        """Stands before RoPE: keeps the block's first frames."""
        if self._start is not None:
            _, k, v = heads
            own = slice(self._start, self._start + self._rows)
            keys = turn_keys(processor, k[:, own], norms[1], self._rotary, across)
            self._new[processor.handle.tolist()[1]] = keys, v[:, own].clone()
        return turn(processor, heads, norms, rotary, across)

    def __call__(self, call: HeadsCall, proceed: Callable[[], Any]) -> Any:
        """Stands around the kernel: the noisier block's frames are further keys."""
        if self._start is None:
            return proceed()
        before, new = self._kept.pop(call.layer, None), self._new.pop(call.layer)
        if before is not None:
            k, v = (x.to(call.k.dtype) for x in before)
            call.segments = [*call.segments, (k, v)]
        out = proceed()
        self._kept[call.layer] = new
        return out
