"""How concentrated attention is: the share of its mass in the best quarter of the key blocks, per layer and head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdit_fast import AttentionPlan, accelerate
from vdit_fast.config import Config
from vdit_fast.context import LayerContext
from vdit_fast.planners import Planner

BLOCK, TILE = 64, 8  # a block is 64 tokens: in frame order four rows of 16, in tile order 8 x 8


def block_mass(q: Tensor, k: Tensor) -> Tensor:
    """Attention mass between blocks of 64 consecutive tokens, ``[query blocks, key blocks]``, rows of sum 1.

    q, k: ``[N, D]`` of one head, N a multiple of 64.
    """
    blocks = q.shape[0] // BLOCK
    rows = []
    for part in q.view(blocks, BLOCK, -1):
        weights = (part @ k.T * q.shape[1] ** -0.5).softmax(-1)
        rows.append(weights.view(BLOCK, blocks, BLOCK).sum((0, 2)) / BLOCK)
    return torch.stack(rows)


def recall(mass: Tensor, share: float = 0.25) -> float:
    """Mean over query blocks of the mass in the best ``share`` of the key blocks; ``share`` if attention is uniform."""
    keep = int(share * mass.shape[1])
    return float(mass.topk(keep, dim=1).values.sum(1).mean())


def tile_order(grid: tuple[int, int, int]) -> Tensor:
    """Token indices so that every 8 x 8 tile of a frame is contiguous."""
    frames, height, width = grid
    index = torch.arange(frames * height * width).view(frames, height // TILE, TILE, width // TILE, TILE)
    return index.permute(0, 1, 3, 2, 4).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class RecallProbe(Planner):
    """Measures the recall of every attention call that it is asked to plan, and leaves the call dense."""

    name: ClassVar[str] = "recall_probe"
    found: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        order = tile_order(ctx.grid)
        for head in range(q.shape[2]):
            for name, rows in (("tile order", order), ("frame order", slice(None))):
                mass = block_mass(q[0, rows, head].float(), k[0, rows, head].float())
                self.found.setdefault((name, ctx.layer, head), []).append(recall(mass))
        return AttentionPlan.dense(q.shape[1])


def measure(model: torch.nn.Module, calls: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Recall ``[layer][head]`` in tile and in frame order, averaged over the given transformer calls."""
    probe = RecallProbe()
    with accelerate(model, Config(attention=probe)), torch.no_grad():
        for arguments in calls:
            model(**arguments)
    layers, heads = (1 + max(key[i] for key in probe.found) for i in (1, 2))
    return {
        name: [
            [sum(values) / len(values) for head in range(heads) for values in [probe.found[name, layer, head]]]
            for layer in range(layers)
        ]
        for name in ("tile order", "frame order")
    }
