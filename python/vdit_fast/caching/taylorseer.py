"""TaylorSeer: features as a Taylor polynomial in the step index, from differences of computed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..ops import taylor_weights
from . import checks
from .base import CachePolicy

if TYPE_CHECKING:
    from ..context import StepContext

MAX_ORDER = 4
"""Most differences that the kernels take."""


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(CachePolicy):
    """TaylorSeer (Liu et al., arXiv 2503.06923), at any granularity; the paper's is ``"module"``.

    At a computed step s, d steps after the last computed one: F_0 is the feature and F_{i+1} = (F_i new − F_i old) / d.
    At a forecast step k steps later the feature is Σ_i F_i · (damping · k)^i / i!.

    Memory is (order + 1) copies of every feature per guidance branch. The paper keeps three or more per block; the
    coarser granularities need orders of magnitude less.

    Knobs besides those of ``CachePolicy``:
        order: degree of the polynomial, 0 to 4 (0 repeats the last computed feature).
        damping: in [0, 1], shortens the forecast distance; 1 is the paper's formula. Differences are taken over past
            steps while features bend, so that a shorter step forward is the better guess (HiCache contracts its
            basis for the same reason).
        blocks: [first, end) of the blocks that ``"span"`` leaves out; negative ones count from the end, an end of None
            is the last block. None: all.

    Raises:
        TypeError, ValueError: a bad knob.
    """

    name: ClassVar[str] = "taylorseer"

    order: int = 1
    damping: float = 0.5
    blocks: tuple[int, int | None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("order", self.order, 0)
        checks.number("order", self.order, 0, MAX_ORDER)
        checks.number("damping", self.damping, 0, 1)
        if self.blocks is not None:
            object.__setattr__(self, "blocks", checks.block_range("blocks", self.blocks))
            if self.granularity != "span":
                raise ValueError(
                    f"blocks is {self.blocks} but granularity is {self.granularity!r}; set granularity to 'span', or "
                    "blocks to null"
                )

    def span(self, step: StepContext, blocks: int) -> tuple[int, int]:
        return checks.resolved("blocks", self.blocks or (0, None), blocks)

    @property
    def degree(self) -> int:
        return self.order

    def weights(self, distance: int, known: int) -> list[float]:
        return taylor_weights(distance, known=known, damping=self.damping)
