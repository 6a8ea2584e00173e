"""Block maps with blocks of any length, also empty ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Map:
    """Arguments of ``ops.compile_blocks``."""

    keep: Tensor
    q_len: Tensor
    kv_len: Tensor
    lq: int
    q_tile: int | None


def draw(
    groups: int,
    nq: int,
    nk: int,
    *,
    density: float = 0.5,
    empty: float = 0.3,
    shared: tuple[bool, bool] = (True, True),
    q_tile: int | None = None,
    seed: int = 0,
) -> Map:
    """``empty``: share of the blocks without rows or keys; ``shared``: one list of lengths (q, kv) for all groups."""
    g = torch.Generator().manual_seed(seed)

    def lengths(n: int, one: bool) -> Tensor:
        shape = (1 if one else groups, n)
        some = torch.randint(1, 40, shape, generator=g)
        return torch.where(torch.rand(shape, generator=g) < empty, 0, some)

    q_len, kv_len = lengths(nq, shared[0]), lengths(nk, shared[1])
    lq = int(q_len.sum(1).max()) if nq else 0
    if nq:  # every group has as many rows
        q_len[:, -1] += lq - q_len.sum(1)
    keep = torch.rand(groups, nq, nk, generator=g) < density
    return Map(keep, q_len, kv_len, lq, q_tile)
