"""The queue of frame blocks at different noise levels, from which a video without end comes out at constant memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdit_fast.parallel.nests import mapped, tensors
from vdit_fast.parallel.noise import NoisePool
from vdit_fast.parallel.sampler import BlockSampler
from vdit_fast.parallel.schedule import Item, Schedule

__all__ = ["BlockQueue", "FrameBlock", "Snapshot"]


@dataclass
class FrameBlock:
    """One queued block."""

    index: int
    latents: Tensor
    """fp32 [1, C, F, H, W]."""
    state: Any
    """Of its schedule."""
    done: int = 0
    """Steps behind it."""
    issued: int = 0
    """Steps that were handed out, at most one more."""


@dataclass
class Snapshot:
    """The queue as it is after an iteration, complete once the last result of that iteration has come."""

    iteration: int
    """The first one that is not in it."""
    queue: dict[str, Any]
    missing: set[int]
    blocks: dict[int, dict[str, Any]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        assert not self.missing
        blocks = [self.blocks[index] for index in sorted(self.blocks)]
        return {"iteration": self.iteration, **self.queue, "blocks": blocks}


class BlockQueue:
    """Frame blocks between noise and video (DualParal, arXiv 2505.21070).

    ``begin`` opens an iteration: a block of noise enters at the tail. ``inputs`` are what the transformer gets for a
    block: its latents behind the last ``num_cat`` ones of its cleaner neighbour as they are then. ``apply`` takes what
    it predicted, and hands out the block when that was its last step.

    Args:
        schedule: sizes and order.
        sampler: denoises blocks; it has ``schedule.steps`` timesteps.
        noise: what blocks start from.
        device: of the latents.
        keep: called with every finished block before a snapshot counts it as finished.
    """

    def __init__(
        self,
        schedule: Schedule,
        sampler: BlockSampler,
        noise: NoisePool,
        device: torch.device | str = "cpu",
        keep: Callable[[FrameBlock], None] | None = None,
    ) -> None:
        if len(sampler.timesteps) != schedule.steps:
            raise ValueError(f"sampler: it has {len(sampler.timesteps)} timesteps, the schedule {schedule.steps} steps")
        self.schedule = schedule
        self.sampler = sampler
        self.noise = noise
        self.device = torch.device(device)
        self._keep = keep
        self.blocks: dict[int, FrameBlock] = {}
        self.iteration = 0
        """The next one to begin."""
        self.finished = 0
        """Blocks that have left."""
        self._end: Tensor | None = None  # the last num_cat latents of the newest block that has left
        self._open: list[tuple[Snapshot, Callable[[Snapshot], None]]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of latents held now."""
        held = [block.latents for block in self.blocks.values()]
        return sum(x.numel() * x.element_size() for x in (*held, *(() if self._end is None else (self._end,))))

    def begin(self) -> list[Item]:
        """Open the next iteration; returns its items, noisiest first."""
        iteration, queued = self.iteration, self.schedule.queued(self.iteration)
        self.iteration += 1
        if len(queued) and queued[-1] == iteration:
            latents = self.noise.draw()[None].to(self.device)
            self.blocks[iteration] = FrameBlock(iteration, latents, self.sampler.fresh())
        return [Item(iteration, block, iteration - block) for block in reversed(queued)]

    def ready(self, index: int) -> bool:
        """Whether all that a block's next step needs has come back: its own last step and its cleaner neighbour's."""
        near = (self.blocks.get(index), self.blocks.get(index - 1) if self.schedule.num_cat else None)
        return all(block is None or block.done == block.issued for block in near)

    def inputs(self, index: int) -> Tensor:
        """fp32 [1, C, num_cat + num_per_block, H, W]; the block's next step is under way from then on."""
        block = self.blocks[index]
        assert self.ready(index), f"block {index} is not ready"
        block.issued += 1
        if index == 0 or not self.schedule.num_cat:
            return block.latents
        before = self.blocks.get(index - 1)
        end = self._end if before is None else before.latents[:, :, -self.schedule.num_cat :]
        assert end is not None
        return torch.cat((end, block.latents), dim=2)

    def apply(self, index: int, prediction: Tensor) -> FrameBlock | None:
        """Take the step that was under way.

        Args:
            prediction: fp32, the transformer's output after guidance for the block's own frames, in the shape of its
                latents.

        Returns:
            the block if it is finished, and so no longer in the queue.
        """
        block = self.blocks[index]
        assert block.issued == block.done + 1
        if prediction.shape != block.latents.shape:
            raise ValueError(f"prediction: {list(prediction.shape)}; block {index} has {list(block.latents.shape)}")
        block.latents = self.sampler.step(block.state, prediction, block.latents, block.done)
        block.done += 1
        gone = block.done == self.schedule.steps
        if gone and self._keep is not None:
            self._keep(block)
        if gone:
            del self.blocks[index]
            self.finished += 1
            if self.schedule.num_cat:
                self._end = block.latents[:, :, -self.schedule.num_cat :].clone()
        for snapshot, _ in self._open:
            if index in snapshot.missing:
                snapshot.missing.discard(index)
                if gone:
                    snapshot.queue |= self._scalars()
                else:
                    snapshot.blocks[index] = self._saved(block)
        self._settle()
        return block if gone else None

    # ------------------------------------------------------------------ checkpoints
    def snapshot(self, when_complete: Callable[[Snapshot], None]) -> None:
        """Take the queue as it will be when all that is under way has come back, before the next iteration begins. The
        queue goes on meanwhile."""
        missing = {index for index, block in self.blocks.items() if block.done < block.issued}
        blocks = {index: self._saved(block) for index, block in self.blocks.items() if index not in missing}
        queue = {"noise": self.noise.state_dict(), **self._scalars()}
        self._open.append((Snapshot(self.iteration, queue, missing, blocks), when_complete))
        self._settle()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot's ``state_dict``."""
        self.iteration, self.finished = state["iteration"], state["finished"]
        self.noise.load_state_dict(state["noise"])
        self._end = None if state["end"] is None else state["end"].to(self.device)
        self.blocks = {}
        for saved in state["blocks"]:
            index, done, latents = saved["index"], saved["done"], saved["latents"].to(self.device)
            here = iter(saved["here"])
            own = mapped(saved["state"], lambda x: x.to(self.device) if next(here) else x)  # noqa: B023
            self.blocks[index] = FrameBlock(index, latents, self.sampler.load(own), done, done)

    def _scalars(self) -> dict[str, Any]:
        return {"finished": self.finished, "end": self._end}

    def _saved(self, block: FrameBlock) -> dict[str, Any]:
        """``here``: which tensors of the sampler's state are on the device of the latents, in the order in which they
        come; a file has them all on the CPU."""
        state = self.sampler.save(block.state)
        here = [x.device == block.latents.device for x in tensors(state)]
        return {"index": block.index, "done": block.done, "latents": block.latents, "state": state, "here": here}

    def _settle(self) -> None:
        complete = [entry for entry in self._open if not entry[0].missing]
        self._open = [entry for entry in self._open if entry[0].missing]
        for snapshot, call in complete:
            call(snapshot)
