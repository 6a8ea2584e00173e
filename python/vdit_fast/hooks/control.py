"""Control states of a ControlNet that enter behind every block (Vivid-VR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vdit_fast.context import StepContext
from vdit_fast.models.hooks import HookPlace, HookRows
from vdit_fast.models.kernels import over_plan

__all__ = ["ControlBranch", "ControlConnector"]


def _mlp(channels: int, width: int, zero: bool) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, channels))
    if zero:
        for parameter in mlp[2].parameters():
            nn.init.zeros_(parameter)
    return mlp


class ControlConnector(nn.Module):
    """How one block takes up a control state (Vivid-VR, arXiv 2508.14483): h -> h + out(attention) + skip(c).

    Dense attention of all video rows h over all control rows c: queries from h, keys from c, each by a small network
    and a LayerNorm per head, values are c itself, no RoPE. The last layers of ``out`` and ``skip`` begin at zero.

    Args:
        channels: C of both.
        heads: number of heads, which divides C.
        width: hidden width of the four networks.
        eps: of the LayerNorms.
    """

    def __init__(self, channels: int, heads: int, width: int = 512, eps: float = 1e-6) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads must divide channels, got {heads} and {channels}")
        self.heads = heads
        self.to_q, self.to_k = _mlp(channels, width, zero=False), _mlp(channels, width, zero=False)
        self.norm_q, self.norm_k = (nn.LayerNorm(channels // heads, eps=eps) for _ in range(2))
        self.out, self.skip = _mlp(channels, width, zero=True), _mlp(channels, width, zero=True)

    def forward(self, h: Tensor, control: Tensor) -> Tensor:
        """h [B, N, C], control [B or 1, N, C] -> [B, N, C]."""
        if control.ndim != 3 or control.shape[0] not in (1, h.shape[0]) or control.shape[1:] != h.shape[1:]:
            raise ValueError(
                f"a control state must be [{h.shape[0]} or 1, {h.shape[1]}, {h.shape[2]}] like the video rows, "
                f"got {list(control.shape)}"
            )
        control = control.to(h.dtype).expand(h.shape[0], -1, -1)
        query = self.norm_q(self.to_q(h).unflatten(-1, (self.heads, -1)))
        key = self.norm_k(self.to_k(control).unflatten(-1, (self.heads, -1)))
        value = control.unflatten(-1, (self.heads, -1))
        attended = over_plan(query, key.to(query.dtype), value.to(query.dtype), None, None, None)
        return h + self.out(attended.flatten(2).to(h.dtype)) + self.skip(control)


class ControlBranch(nn.Module):
    """Puts control states behind blocks: block i takes up state ``i // blocks_per_state`` by its own connector.

    Vivid-VR has 6 states for 42 blocks, 7 blocks each. Run the ControlNet, set ``states``, run the transformer; do so
    for every guidance branch.

    Args:
        connectors: one for each block, None for a block without.
        blocks_per_state: how many blocks share a state.

    ``states`` are [B or 1, N, C] in the order of the token grid; empty: every block is left as it is.
    """

    where: ClassVar[str] = "block_output"

    def __init__(self, connectors: Sequence[nn.Module | None], blocks_per_state: int = 7) -> None:
        super().__init__()
        if isinstance(blocks_per_state, bool) or not isinstance(blocks_per_state, int) or blocks_per_state < 1:
            raise ValueError(f"blocks_per_state must be a positive integer, got {blocks_per_state!r}")
        self.connectors = nn.ModuleList([nn.Identity() if part is None else part for part in connectors])
        self.blocks_per_state = blocks_per_state
        self.states: Sequence[Tensor] = ()

    def forward(self, step: StepContext, place: HookPlace, rows: HookRows) -> Tensor | None:
        if not self.states:
            return None
        index, state = place.index, place.index // self.blocks_per_state
        if index >= len(self.connectors) or state >= len(self.states):
            raise ValueError(
                f"ControlBranch: block {index} wants connector {index} and state {state}, but there are "
                f"{len(self.connectors)} and {len(self.states)}"
            )
        connector = self.connectors[index]
        if isinstance(connector, nn.Identity):
            return None
        answer: Tensor = connector(rows.video, self.states[state])
        return answer
