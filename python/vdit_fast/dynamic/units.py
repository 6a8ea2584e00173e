"""Which heads or hidden groups of a layer are on, and the parts of its weights that belong to them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Units", "WeightParts", "take"]

MASKS_KEPT = 4
"""Distinct masks whose weights a layer keeps: neighbouring timesteps mostly share theirs."""


@dataclass(frozen=True)
class Units:
    """Units (attention heads, groups of hidden channels) of one layer that are on in one call."""

    on: tuple[bool, ...]
    """Those that are on for any batch item: what is computed."""
    items: Tensor | None = None
    """Where batch items differ: bool ``[B, computed units]`` on the device, which of those an item has; else None."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[bool]], device: torch.device) -> Units:
        """The units of a call from one row per batch item."""
        first = tuple(rows[0])
        if all(tuple(row) == first for row in rows):
            return cls(first)
        union = tuple(any(column) for column in zip(*rows, strict=True))
        computed = [[row[unit] for unit, on in enumerate(union) if on] for row in rows]
        return cls(union, torch.tensor(computed, dtype=torch.bool, device=device))

    @property
    def count(self) -> int:
        """How many are computed."""
        return sum(self.on)

    @property
    def all_on(self) -> bool:
        """Whether the dense layer is meant."""
        return self.items is None and all(self.on)

    def zeroed(self, x: Tensor) -> Tensor:
        """x ``[B', N, count * channels]`` with what is off for its item as 0; B' is a multiple of B, items first."""
        if self.items is None:
            return x
        kept = self.items.repeat_interleave(x.shape[0] // len(self.items), 0)[:, None, :, None]
        return torch.where(kept, x.unflatten(-1, (self.count, -1)), 0).flatten(-2)


def take(x: Tensor, dim: int, on: Sequence[bool], parts: int = 1) -> Tensor:
    """The units of ``dim`` that are on: a view where they are neighbours, else a copy.

    Args:
        x: ``dim`` holds ``parts`` times all units (the two halves of a gated layer, q, k and v), each of the same
            number of channels.
    """
    size = x.shape[dim] // (len(on) * parts)
    runs: list[list[int]] = []
    for unit, is_on in enumerate([*on] * parts):
        if not is_on:
            continue
        if runs and sum(runs[-1]) == unit:
            runs[-1][1] += 1
        else:
            runs.append([unit, 1])
    pieces = [x.narrow(dim, first * size, count * size) for first, count in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class WeightParts:
    """Parts of one layer's parameters per distinct mask, made anew when a parameter has changed."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bool, ...], tuple[Tensor | None, ...]] = OrderedDict()
        self._seen: tuple[Any, ...] = ()

    def get(
        self,
        on: tuple[bool, ...],
        parameters: Sequence[Tensor | None],
        make: Callable[[], tuple[Tensor | None, ...]],
    ) -> tuple[Tensor | None, ...]:
        """What ``make`` returns for this mask, kept while ``parameters`` stay as they are."""
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
            return make()  # part of this call's graph
        seen = tuple(None if p is None else (p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)
        if seen != self._seen:
            self._kept.clear()
            self._seen = seen
        if on not in self._kept:
            self._kept[on] = make()
            if len(self._kept) > MASKS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(on)
        return self._kept[on]

    @property
    def bytes(self) -> int:
        """Memory of the copies; views cost none."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
               for parts in self._kept.values() for t in parts if t is not None}  # fmt: skip
        return sum(size for start, size in own.items() if start not in {entry[0] for entry in self._seen if entry})

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightParts:
        return WeightParts()

    def __reduce__(self) -> Any:
        return WeightParts, ()
