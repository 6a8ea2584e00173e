"""Which rows of a sequence one of several ranks has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vdit_fast.models.forward import Forward

__all__ = ["RowShard", "equal_rows"]


def equal_rows(total: int, ranks: int) -> tuple[int, ...]:
    """Rows of every rank: the first ``total % ranks`` have one more than the others, as in ``torch.tensor_split``."""
    return tuple(total // ranks + (rank < total % ranks) for rank in range(ranks))


@dataclass(eq=False)
class RowShard:
    """The video rows of one rank in a forward: a run of them, in the order of the ranks. All ranks have the text."""

    sizes: tuple[int, ...]
    """Rows of every rank."""
    rank: int
    text_first: bool = False
    _taken: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def rows(self) -> int:
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        """The first own row."""
        return sum(self.sizes[: self.rank])

    # ------------------------------------------------------------------ from all rows to the own ones
    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """The own ones of all video rows."""
        return x.narrow(dim, self.start, self.rows)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """``own`` of what all blocks of a forward get: cut once."""
        return self._once(x, dim, lambda: self.own(x, dim).contiguous())

    def take_joint(self, x: Tensor, dim: int) -> Tensor:
        """``take`` where a dimension has one entry per token of video and text."""
        text = x.shape[dim] - self.total
        if not text:
            return self.take(x, dim)
        sizes = (text, self.total) if self.text_first else (self.total, text)

        def cut() -> Tensor:
            first, second = x.split(sizes, dim)
            parts = (first, self.own(second, dim)) if self.text_first else (self.own(first, dim), second)
            return torch.cat(parts, dim)

        return self._once(x, dim, cut)

    def _once(self, x: Tensor, dim: int, cut: Callable[[], Tensor]) -> Tensor:
        known = self._taken.get((id(x), dim))
        if known is None:
            known = self._taken[id(x), dim] = x, cut()
        return known[1]

    def source(self, cut: Tensor) -> tuple[Tensor, int] | None:
        """What ``take`` cut this from, and along which dimension."""
        found = ((whole, dim) for (_, dim), (whole, part) in self._taken.items() if part is cut)
        return next(found, None)

    def note(self, anchor: Callable[[Tensor, Forward], None], forward: Forward) -> None:
        """Tell which forward what was cut, and from what, belongs to."""
        for whole, cut in self._taken.values():
            anchor(whole, forward)
            anchor(cut, forward)

    # ------------------------------------------------------------------ joint sequences [B, N, ...]
    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(own video rows, text) of the rank's joint sequence."""
        return self._parts(x, self.rows)

    def parts_of_whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(all video rows, text) of the whole joint sequence."""
        return self._parts(x, self.total)

    def _parts(self, x: Tensor, video: int) -> tuple[Tensor, Tensor]:
        text = x.shape[1] - video
        return (x[:, text:], x[:, :text]) if self.text_first else (x[:, :video], x[:, video:])

    def join(self, video: Tensor, text: Tensor) -> Tensor:
        """The joint sequence of both in the model's order."""
        parts: Sequence[Tensor] = (text, video) if self.text_first else (video, text)
        return torch.cat(list(parts), dim=1)
