"""How a feature cache keeps what blocks add to the residual streams and forecasts it: the base, and block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import budget

if TYPE_CHECKING:
    from ..models.blocks import BlockCall
    from .engine import FeatureCache, Run

__all__ = ["BlockFeatures", "Features"]


class Features(ABC):
    """How one granularity records computed blocks and forecasts them."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self._forms: dict[int, int] = {}  # by block that ran: number of tensors in its tuple, 0 for a bare tensor

    def of(self, cache: FeatureCache) -> Features:
        """The same for another cache, without records."""
        return type(self)(cache)

    @abstractmethod
    def missing(self, run: Run) -> str | None:
        """Why the run cannot be forecast, None where it can."""

    @abstractmethod
    def compute(self, run: Run, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        """Run a block and take note."""

    @abstractmethod
    def forecast(self, run: Run, call: BlockCall) -> Any | None:
        """The block's output, None where it has to run."""

    def _pairs(self, call: BlockCall, inputs: Sequence[Tensor | None], output: Any) -> list[tuple[Tensor, Tensor]]:
        """(input, output) of every stream that a block returned; the form of its output is remembered.

        Raises:
            RuntimeError: an output has no input of its shape.
        """
        self._forms[call.block.index] = 0 if isinstance(output, Tensor) else len(output)
        pairs = []
        for x, y in zip(inputs, (output,) if isinstance(output, Tensor) else output, strict=False):
            if x is None or x.shape != y.shape:
                raise RuntimeError(
                    f"the cache needs blocks whose outputs have the shapes of their inputs, {call.block.name} made "
                    f"{tuple(y.shape)} of {None if x is None else tuple(x.shape)}; set granularity to 'model'"
                )
            pairs.append((x, y))
        return pairs

    def _inputs(self, call: BlockCall) -> tuple[Tensor, ...] | None:
        """The streams that the block would change, None where it has never run."""
        form = self._forms.get(call.block.index)
        if form is None:
            return None
        found = call.inputs[: max(1, form)]
        return tuple(x for x in found if x is not None) if None not in found else None

    def _output(self, call: BlockCall, new: Sequence[Tensor]) -> Any:
        return tuple(new) if self._forms[call.block.index] else new[0]

    def _afford(self, run: Run, call: BlockCall, pairs: list[tuple[Tensor, Tensor]]) -> None:
        first, end = run.span
        changed = [y for _, y in pairs]
        sizes = {"span": budget.size_of(changed), "block": budget.size_of(changed, end - first)}
        self.cache.afford(run, sizes, changed[0].dtype, len(changed[0]))


class BlockFeatures(Features):
    """The offset that every block adds to every stream."""

    def missing(self, run: Run) -> str | None:
        return None if run.stream.factors else "nothing to forecast from yet"

    def compute(self, run: Run, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        inputs = call.inputs
        output = proceed()
        pairs = self._pairs(call, inputs, output)
        self._afford(run, call, pairs)
        for stream, (x, y) in enumerate(pairs):
            self.cache.factors(run, self._key(call, stream), y).update(run.step, y, minus=x)
        return output

    def forecast(self, run: Run, call: BlockCall) -> Any | None:
        inputs = self._inputs(call)
        if inputs is None:
            return None
        found = [run.stream.factors.get(self._key(call, stream)) for stream in range(len(inputs))]
        known = [factors for factors in found if factors is not None and factors.known]
        if len(known) < len(inputs):
            return None
        weights = self.cache.weights(run, known[0])
        return self._output(call, [factors.added_to(x, weights) for x, factors in zip(inputs, known, strict=True)])

    def _key(self, call: BlockCall, stream: int) -> Hashable:
        return call.block.index, stream
