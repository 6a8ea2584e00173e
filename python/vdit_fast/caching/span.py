"""A span of blocks as one feature: the sum of what its blocks add, and nothing of what the model adds between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .features import Features

if TYPE_CHECKING:
    from ..models.blocks import BlockCall
    from .engine import Run

__all__ = ["SpanFeatures"]


class _Chain:
    """Blocks of which each got the very tensor that the one before returned."""

    def __init__(self, start: Tensor) -> None:
        self.start = self.last = start
        self._versions = (start._version, start._version)

    def extend(self, last: Tensor) -> None:
        self.last, self._versions = last, (self._versions[0], last._version)

    def intact(self) -> bool:
        """Whether nobody has changed its ends in place."""
        return (self.start._version, self.last._version) == self._versions


class Sum:
    """The sum of y - x over a stream's blocks. In a chain the terms between cancel, and two reads make up for all."""

    def __init__(self) -> None:
        self._total: Tensor | None = None  # of the chains that are finished
        self._chain: _Chain | None = None
        self.lost = False
        """Whether a tensor was changed in place before it was read."""

    def add(self, x: Tensor, y: Tensor, late: bool) -> None:
        """One more block; ``late`` false reads x and y now."""
        if self._chain is not None and x is not self._chain.last:
            self._close(self._chain)
        if not late or x.is_inference() or y.is_inference():  # inference tensors do not count their changes
            self._total = _plus(self._total, x, y)
            return
        if self._chain is None:
            self._chain = _Chain(x)
        self.lost |= not self._chain.intact()
        self._chain.extend(y)

    def _close(self, chain: _Chain) -> None:
        self.lost |= not chain.intact()
        self._total, self._chain = _plus(self._total, chain.start, chain.last), None

    def result(self) -> tuple[Tensor, Tensor | None]:
        """The sum as (output, minus)."""
        chain = self._chain
        if chain is not None and self._total is None:
            self.lost |= not chain.intact()
            return chain.last, chain.start
        if chain is not None:
            self._close(chain)
        assert self._total is not None
        return self._total, None


def _plus(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    added = y.to(torch.promote_types(torch.float32, y.dtype)) - x
    return added if total is None else total.add_(added)


class SpanFeatures(Features):
    """The offset that a range of blocks adds to every stream. A forecast adds it before the first of them."""

    late = True
    """Whether offsets may be read at the end of a chain; false after a model changed a stream in place."""

    def missing(self, run: Run) -> str | None:
        found = run.stream.factors.get((*run.span, 0))
        return None if found is not None and found.known else "nothing to forecast from yet"

    def compute(self, run: Run, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        inputs = call.inputs
        output = proceed()
        pairs = self._pairs(call, inputs, output)
        self._afford(run, call, pairs)
        if run.state is None:
            run.state = [Sum() for _ in pairs]
        for total, (x, y) in zip(run.state, pairs, strict=True):
            total.add(x, y, self.late)
        if call.block.index == run.span[1] - 1:
            self._finish(run, [y for _, y in pairs])
        return output

    def _finish(self, run: Run, like: list[Tensor]) -> None:
        sums, run.state = run.state, None
        found = [total.result() for total in sums]
        for key in [key for key in run.stream.factors if key[:2] != run.span]:  # type: ignore[index]
            del run.stream.factors[key]  # another span, which is over
        if any(total.lost for total in sums):
            self.late = False  # this forward cannot be forecast from; the next one reads every block's offset at once
            return
        for stream, (output, minus) in enumerate(found):
            self.cache.factors(run, self._key(run, stream), like[stream]).update(run.step, output, minus=minus)

    def forecast(self, run: Run, call: BlockCall) -> Any | None:
        inputs = self._inputs(call)
        if inputs is None:
            return None
        if run.state is None:  # the first block of the span that is called
            run.state = "added"
            found = [run.stream.factors[self._key(run, stream)] for stream in range(len(inputs))]
            weights = self.cache.weights(run, found[0])
            inputs = tuple(factors.added_to(x, weights) for x, factors in zip(inputs, found, strict=True))
        return self._output(call, inputs)

    def _key(self, run: Run, stream: int) -> Hashable:
        return (*run.span, stream)
