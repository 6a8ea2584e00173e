"""Who computes what and when in a pipeline of frame blocks, and what that sends: closed forms, without a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Item", "Schedule", "split_layers"]


def split_layers(layers: int, ranks: int, per_rank: Sequence[int] | None = None) -> list[range]:
    """Which layers each rank has: ``layers // ranks`` and one more on the first ``layers % ranks`` of them.

    Args:
        per_rank: numbers of layers instead.

    Raises:
        ValueError: a rank would have none, or ``per_rank`` does not add up.
    """
    if layers < 1 or ranks < 1 or ranks > layers:
        raise ValueError(f"ranks: {ranks}; {layers} layers can be split over 1 to {layers} ranks")
    if per_rank is None:
        sizes = [layers // ranks + (rank < layers % ranks) for rank in range(ranks)]
    else:
        sizes = list(per_rank)
        if len(sizes) != ranks or sum(sizes) != layers or min(sizes) < 1:
            raise ValueError(f"layers_per_stage: {sizes}; {ranks} positive numbers with the sum {layers} are needed")
    starts = [sum(sizes[:rank]) for rank in range(ranks)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


@dataclass(frozen=True)
class Item:
    """One denoising step of one frame block: one pass through all stages."""

    iteration: int
    block: int
    step: int


@dataclass(frozen=True)
class Schedule:
    """DualParal's queue of frame blocks (arXiv 2505.21070): every iteration gives each queued block one step.

    Block b enters in iteration b and leaves after iteration b + steps - 1.

    Args:
        steps: denoising steps of a block.
        blocks: number of frame blocks; None: without end.
        num_per_block: latent frames of a block.
        num_cat: latent frames that a block sees of either neighbour. The first block is longer by them.
    """

    steps: int
    blocks: int | None
    num_per_block: int
    num_cat: int

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("num_per_block", 1), ("num_cat", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: {value!r}; an integer of at least {least} is needed")
        if self.blocks is not None and (not isinstance(self.blocks, int) or self.blocks < 1):
            raise ValueError(f"blocks: {self.blocks!r}; an integer of at least 1, or None for a video without end")
        if self.num_cat > self.num_per_block:
            raise ValueError(
                f"num_cat: {self.num_cat}; at most num_per_block = {self.num_per_block}, as a block sees of its direct "
                f"neighbours only; pass num_cat={self.num_per_block} or less (0: blocks see nothing of each other), or "
                "longer blocks"
            )

    @property
    def frames(self) -> int:
        """Latent frames in every pass: the block with what it sees before it."""
        return self.num_cat + self.num_per_block

    @property
    def iterations(self) -> int | None:
        """``steps + blocks - 1``."""
        return None if self.blocks is None else self.steps + self.blocks - 1

    def frames_of(self, block: int) -> int:
        """Latent frames that a block adds to the video."""
        return self.frames if block == 0 else self.num_per_block

    def video_frames(self, blocks: int) -> int:
        """Latent frames of so many blocks together."""
        return blocks * self.num_per_block + self.num_cat if blocks else 0

    def queued(self, iteration: int) -> range:
        """The blocks that get a step in an iteration, cleanest first."""
        last = iteration if self.blocks is None else min(iteration, self.blocks - 1)
        return range(max(0, iteration - self.steps + 1), last + 1)

    def items(self, first: int = 0) -> Iterator[Item]:
        """All items from an iteration on in the order in which every stage computes them: noisiest block first, so
        that a block finds the keys of its noisier neighbour, which passed just before it."""
        iteration = first
        while self.iterations is None or iteration < self.iterations:
            for block in reversed(self.queued(iteration)):
                yield Item(iteration, block, iteration - block)
            iteration += 1

    def count(self, first: int = 0) -> int | None:
        """Number of items from an iteration on."""
        if self.iterations is None:
            return None
        return sum(len(self.queued(iteration)) for iteration in range(first, self.iterations))

    # ------------------------------------------------------------------ what is sent
    def hop_values(self, branches: int, tokens_per_frame: int, channels: int) -> int:
        """Values in the message from a stage to the next: ``branches · (num_cat + num_per_block) · p · C``."""
        return branches * self.frames * tokens_per_frame * channels

    def result_values(self, block: int, latents_per_frame: int) -> int:
        """Values that come back from the last stage: the block's own frames."""
        return self.frames_of(block) * latents_per_frame

    def result_total(self, latents_per_frame: int, first: int = 0) -> int:
        """Values that come back in all items from an iteration on."""
        return sum(self.result_values(item.block, latents_per_frame) for item in self.items(first))
