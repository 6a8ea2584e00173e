"""What ranks say of their inputs before they exchange anything: sizes that differ are an error of all of them.

An exchange in which ranks expect different sizes ends their processes (gloo), or never returns (NCCL).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from vdit_fast.parallel.collectives import Run, at_once
from vdit_fast.parallel.identity import digest

__all__ = ["Agreement", "described"]

ROOM = 256
"""Bytes of the text that every rank sends."""


def described(name: str, x: Tensor) -> str:
    """A tensor as it is compared: shape and dtype."""
    return f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


class Agreement:
    """Compares what the ranks of a group were given, once per forward: one message of 256 bytes to every rank.

    Where a group has NCCL alone, the host would wait for the device: there the first forward of a generation is
    compared, and one host read is its price.

    Args:
        group: the ranks.
        what: whose call it is, for messages.
        run: runs the exchange.
    """

    def __init__(self, group: dist.ProcessGroup, what: str, run: Run = at_once) -> None:
        self.group, self.what, self.run = group, what, run
        self.ranks = dist.get_world_size(group)
        self._host = "cpu:" in dist.get_backend_config(group)
        self._generation: Hashable = self  # none that a forward can have

    @torch.compiler.disable
    def __call__(self, given: str, device: torch.device, generation: Hashable) -> None:
        """All ranks call it, at the same place.

        Args:
            given: what must be the same on all of them, in a few words.
            device: of the model.
            generation: that the forward belongs to.

        Raises:
            ValueError: on all ranks; it is not the same.
        """
        if self.ranks == 1 or (not self._host and generation == self._generation):
            return
        self._generation = self  # until all agree
        text = given.encode().ljust(ROOM)
        if len(text) > ROOM:
            end = digest(given).encode()
            text = text[: ROOM - len(end)] + end
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8).to("cpu" if self._host else device)
        found = own.new_empty(self.ranks, ROOM)
        self.run(lambda later: dist.all_gather(list(found.unbind(0)), own, group=self.group, async_op=later))
        texts = [bytes(row) for row in found.tolist()]
        if any(other != text for other in texts):
            raise ValueError(self._difference([other.decode(errors="replace").rstrip() for other in texts]))
        self._generation = generation

    def _difference(self, texts: list[str]) -> str:
        ranks: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            ranks.setdefault(text, []).append(rank)
        listed = "; ".join(f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {t}" for t, who in ranks.items())
        return (
            f"{self.what}: the ranks were given inputs of different sizes ({listed}); call the model with the same "
            "arguments on every rank of the group"
        )
