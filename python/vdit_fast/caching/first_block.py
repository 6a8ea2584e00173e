"""First-block cache: the first block always runs, and what it adds decides whether the others do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .adaptive import AdaptivePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from ..context import StepContext
    from .stream import Stream


@dataclass(frozen=True, kw_only=True)
class FirstBlock(AdaptivePolicy):
    """First-block cache, as ParaAttention and diffusers have it.

    The first block runs in every step. While what it adds to the video stream differs from the last computed step's by
    less than ``threshold``, what all others added then is added again. Every family with known blocks is served,
    whatever lies between them.

    Knobs: those of ``AdaptivePolicy``.
    """

    name: ClassVar[str] = "first_block"
    looks_at: ClassVar[str] = "first block"

    def span(self, step: StepContext, blocks: int) -> tuple[int, int]:
        if blocks < 2:
            raise ValueError(f"first_block needs a transformer of at least 2 blocks, this one has {blocks}")
        return 1, blocks

    def verdict(self, stream: Stream, change: float) -> str | None:
        small = change < self.threshold  # false for NaN
        return None if small else f"the first block's residual changed by {self.threshold:g} or more"

    def keep(self, stream: Stream, now: Tensor, computed: bool) -> None:
        if computed:
            stream.seen = now
