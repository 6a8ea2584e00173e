"""What all ranks must know of one run of a stage pipeline, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vdit_fast.parallel.identity import other_weights
from vdit_fast.parallel.packing import Packing, Plain
from vdit_fast.parallel.schedule import Item, Schedule
from vdit_fast.parallel.stage import Conditions

__all__ = ["Run"]

FP32 = 4  # bytes; what comes back to the first rank


@dataclass
class Run:
    """The first rank makes it and tells the others."""

    schedule: Schedule
    shape: tuple[int, ...]
    """[B, C, F, H, W] of the latents in a pass."""
    guidance: float
    first: int
    """Iteration that the run begins with."""
    timesteps: list[float]
    arguments: dict[str, Any]
    conditions: Conditions
    stream: tuple[tuple[int, ...], torch.dtype]
    """Shape and dtype of what one stage hands to the next."""
    options: dict[str, Any]
    """What the pipelines of all ranks must have in common."""
    weights: dict[str, str]
    """Digests of parameters that are the first rank's, or were in the run that goes on."""

    def check(self, rank: int, options: dict[str, Any], weights: dict[str, str]) -> None:
        """Compare with what another rank has.

        Raises:
            ValueError: something differs; the message says what.
        """
        for name, value in self.options.items():
            if options[name] != value:
                raise ValueError(
                    f"{name}: {options[name]} on rank {rank}, but {value} on the first one; make the pipelines of all "
                    "ranks with the same settings of the same model"
                )
        different = other_weights(self.weights, weights)
        if different is not None:
            raise ValueError(
                f"weights: those of rank {rank} and of the first one, or of the checkpoint, differ in {different}; "
                "load the same on all ranks, or release=True where a rank has only those of its blocks"
            )

    @property
    def branches(self) -> int:
        return self.shape[0]

    @property
    def _per_frame(self) -> int:
        return math.prod((self.shape[1], *self.shape[3:]))

    def prediction(self, item: Item) -> tuple[int, ...]:
        """Shape of what comes back to the first rank."""
        _, channels, _, height, width = self.shape
        return (1, channels, self.schedule.frames_of(item.block), height, width)

    def result(self, item: Item, device: torch.device) -> Tensor:
        """The buffer that it comes in."""
        return torch.empty(math.prod(self.prediction(item)), dtype=torch.float32, device=device)

    def sizes(self, packing: Packing) -> dict[str, Any]:
        """``schedule``, ``hop_bytes`` and ``result_bytes`` of a trace."""
        wire = packing.empty(*self.stream, "meta")
        return {
            "schedule": asdict(self.schedule) | {"branches": self.branches, "first": self.first},
            "hop_bytes": wire.numel() * wire.element_size(),
            "result_bytes": [FP32 * self.schedule.result_values(block, self._per_frame) for block in (0, 1)],
        }

    def expected(self, rank: int, ranks: int, packing: Packing) -> dict[str, list[int]]:
        """[messages, bytes] by the closed formula.

        Raises:
            RuntimeError: the video has no end.
        """
        count = self.schedule.count(self.first)
        if count is None:
            raise RuntimeError("expected: a video without end has no number of messages")
        if ranks == 1:
            return {"sent": [0, 0], "received": [0, 0]}
        (batch, tokens, channels), dtype = self.stream
        hop = self.schedule.hop_values(batch, tokens // self.schedule.frames, channels) * dtype.itemsize
        if not isinstance(packing, Plain):
            hop = self.sizes(packing)["hop_bytes"]
        result = FP32 * self.schedule.result_total(self._per_frame, self.first)
        return {
            "sent": [count, result if rank == ranks - 1 else count * hop],
            "received": [count, result if rank == 0 else count * hop],
        }
