"""Block-causal attention over frames: a block of frames reads itself and all earlier blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from vdit_fast.models.geometry import Geometry
from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.builders import compile_map

__all__ = ["block_causal_plan", "is_block_causal"]

Q_TILE = 128


def _blocks(geometry: Geometry) -> tuple[int, int]:
    """(number of blocks, tokens per block)."""
    frames, height, width = geometry.grid
    return frames // geometry.frame_block, geometry.frame_block * height * width


def is_block_causal(mask: Tensor, geometry: Geometry) -> bool:
    """Whether a bool mask [1, 1, N, N] is the geometry's block-causal one.

    Its entries are looked at on a CPU only: elsewhere that would wait for the device.
    """
    if not geometry.frame_block or geometry.grid[0] % geometry.frame_block or geometry.text != 0:
        return False
    if mask.dtype != torch.bool or mask.shape != (1, 1, geometry.n_video, geometry.n_video):
        return False
    if mask.device.type != "cpu":
        return True
    count, tokens = _blocks(geometry)
    block = torch.arange(count).repeat_interleave(tokens)
    return torch.equal(mask[0, 0], block[:, None] >= block)


def block_causal_plan(geometry: Geometry, device: torch.device) -> AttentionPlan:
    """The plan that reads what the mask allows, without a mask."""
    count, tokens = _blocks(geometry)
    allow = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    lengths = torch.full((1, count), tokens)
    plan = compile_map(allow, lengths, lengths, count * tokens, count * tokens, q_tile=Q_TILE)
    return plan.to(device)
