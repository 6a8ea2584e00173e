"""The noise that frame blocks start from, so that neighbours fit and no window sees a frame's noise twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["NoisePool"]


class NoisePool:
    """DualParal's coordinated noise (arXiv 2505.21070): one pool of ``num_cat + num_per_block`` frames for all blocks.

    The pool is always the noise of the newest block's window, what it sees before it included. The next window is the
    pool's last ``num_cat`` frames, which are the newest block's own end, then the others in random order: the frames of
    a window are always all those of the pool, each once. The first block is a whole window.

    Args:
        shape: (channels, height, width) of a latent frame.
        seed: of a generator on the CPU, so that every device gets the same noise.
    """

    def __init__(self, shape: tuple[int, int, int], num_per_block: int, num_cat: int, seed: int = 0) -> None:
        self.num_per_block = num_per_block
        self.num_cat = num_cat
        self.generator = torch.Generator().manual_seed(seed)
        channels, height, width = shape
        self.pool = torch.randn(channels, num_cat + num_per_block, height, width, generator=self.generator)
        self._first = True

    def draw(self) -> Tensor:
        """Noise of the next block: fp32 [C, num_per_block, H, W], the first one num_cat frames longer."""
        if self._first:
            self._first = False
            return self.pool.clone()
        order = torch.randperm(self.num_per_block, generator=self.generator)
        rest = self.pool[:, : self.num_per_block][:, order]
        self.pool = torch.cat((self.pool[:, self.num_per_block :], rest), dim=1)
        return rest.clone()

    def state_dict(self) -> dict[str, Any]:
        return {"pool": self.pool, "generator": self.generator.get_state(), "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool, self._first = state["pool"], state["first"]
        self.generator.set_state(state["generator"])
