"""What feature caches must know of a block: what of it is kept, how that enters the residual, what moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from vdit_fast.caching.arithmetic import forecast_gate_add
from vdit_fast.models.fusion import as_rows, distinct_rows_of
from vdit_fast.reference.adaln import Rounding, Table

if TYPE_CHECKING:
    from vdit_fast.caching.stream import Factors
    from vdit_fast.models.forward import Forward
    from vdit_fast.models.memory import MemoryLayout

__all__ = ["BlockModules", "Forecast", "OneStream", "Outputs"]

Outputs = Mapping[str, Sequence[Any]]
"""What sub-modules returned during one call of their block, in the order of their calls, by name."""

_AT_ONCE = 3
"""Modules that one pass adds."""


class Forecast:
    """The cached features of one block at a step that is forecast."""

    def __init__(
        self, factors: Mapping[str, Factors], weights: list[float], rounding: Rounding, forward: Forward | None
    ) -> None:
        self._factors, self._weights, self._rounding, self._forward = factors, weights, rounding, forward

    def add(self, x: Tensor, gates: Mapping[str, Table | None], index: Tensor | None = None) -> Tensor:
        """x [B, N, D] plus the features under their gates, a new tensor.

        Args:
            gates: feature -> its gate of the current step, a table as in ``ops.adaln_modulate``, None for 1.
            index: int32 [N] or [B, N], the row of every token in gates of several rows.
        """
        x, names = as_rows(x), list(gates)
        for at in range(0, len(names), _AT_ONCE):
            some = names[at : at + _AT_ONCE]
            held = [self._factors[name].here() for name in some]
            x = forecast_gate_add(
                x, [factors for factors, _ in held], [gates[name] for name in some],
                weights=self._weights, index=index, rounding=self._rounding, scales=[scales for _, scales in held],
            )  # fmt: skip
        return x

    def distinct(self, temb: Tensor, rows_dim: int) -> tuple[Tensor, Tensor | None]:
        """See ``fusion.distinct_rows``."""
        return distinct_rows_of(self._forward, temb, rows_dim)


class BlockModules(Protocol):
    """One class of blocks."""

    @property
    def memory(self) -> MemoryLayout | str:
        """How keys and values of memory rows are made, or why they cannot be."""
        ...

    @property
    def hooked(self) -> tuple[str, ...]:
        """The sub-modules whose outputs are looked at; those that a block does not have are None there."""
        ...

    def parts(self, block: Any) -> Mapping[str, tuple[int, ...]]:
        """Feature -> the streams of the block whose tokens it has, one behind the other."""
        ...

    def features(self, block: Any, outputs: Outputs) -> Mapping[str, Tensor]:
        """Feature -> [B, N, D], what it adds to the residual stream once its gate has multiplied it."""
        ...

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        """The video's input of the block's attention, normed and modulated by the timestep, from its arguments."""
        ...

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Any:
        """The block's output from its arguments, by name, and forecast features: gates and sums, no module runs."""
        ...


class OneStream:
    """Sub-modules that each return what they add, before the gate: a feature of the video's rows. Those that a block
    does not have are left out."""

    hooked: tuple[str, ...]

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return {name: (0,) for name in self.hooked if getattr(block, name) is not None}

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        return {name: outputs[name][0] for name in self.parts(block)}
