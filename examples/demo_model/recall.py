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

BLOCK = 64  # tokens

# Tokens (frames, rows, columns) of a piece that is contiguous, and the axes from the slowest to the fastest of the
# pieces and inside one: what a block of 64 tokens is depends on the order that a planner gives a head.
ORDERS = {
    "tile order": ((1, 8, 8), (0, 1, 2)),
    "frame order": ((1, 16, 16), (0, 1, 2)),
    "cube order": ((4, 4, 4), (0, 1, 2)),
    "place order": ((24, 1, 1), (1, 2, 0)),
}


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


def token_order(grid: tuple[int, int, int], piece: tuple[int, int, int], major: tuple[int, int, int]) -> Tensor:
    """Token indices so that pieces of these sides are contiguous, walked along the axes ``major``, slowest first."""
    sides = [min(p, n) for p, n in zip(piece, grid, strict=True)]
    shape = [x for n, p in zip(grid, sides, strict=True) for x in (n // p, p)]
    index = torch.arange(grid[0] * grid[1] * grid[2]).view(shape)
    return index.permute(*(2 * i for i in major), *(2 * i + 1 for i in major)).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class RecallProbe(Planner):
    """Measures the recall of every attention call that it is asked to plan, and leaves the call dense."""

    name: ClassVar[str] = "recall_probe"
    found: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        orders = {name: token_order(ctx.grid, *how) for name, how in ORDERS.items()}
        for head in range(q.shape[2]):
            for name, rows in orders.items():
                mass = block_mass(q[0, rows, head].float(), k[0, rows, head].float())
                self.found.setdefault((name, ctx.layer, head), []).append(recall(mass))
        return AttentionPlan.dense(q.shape[1])


def measure(model: torch.nn.Module, calls: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Recall ``[layer][head]`` in every order, averaged over the given transformer calls, and in each head's best."""
    probe = RecallProbe()
    with accelerate(model, Config(attention=probe)), torch.no_grad():
        for arguments in calls:
            model(**arguments)
    layers, heads = (1 + max(key[i] for key in probe.found) for i in (1, 2))
    found = {
        name: [
            [sum(values) / len(values) for head in range(heads) for values in [probe.found[name, layer, head]]]
            for layer in range(layers)
        ]
        for name in ORDERS
    }
    found["best order of each head"] = [
        [max(found[name][layer][head] for name in ORDERS) for head in range(heads)] for layer in range(layers)
    ]
    return found
