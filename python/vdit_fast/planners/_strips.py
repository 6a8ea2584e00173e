"""Blocks of consecutive video tokens, in the order the sequence has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._tokens import Tiling, tiling

if TYPE_CHECKING:
    from ..context import LayerContext


def equal(length: int, block: int) -> tuple[int, ...]:
    """Pieces of `block` tokens and a shorter tail: equal(300, 128) = (128, 128, 44)."""
    return tuple(min(block, length - start) for start in range(0, length, block))


def strips(pieces: tuple[int, ...], ctx: LayerContext, sinks: int, device: torch.device) -> Tiling:
    """Video blocks of the given lengths and text blocks, whose `order` is the identity.

    A block that touches the first `sinks` frames is a sink.
    """
    frame = ctx.grid[1] * ctx.grid[2]
    return tiling((pieces, (1,), (1,)), text=ctx.text, text_first=ctx.text_first, sinks=sinks * frame, device=device)


def valid_keys(ctx: LayerContext, device: torch.device) -> Tensor | None:
    """`ctx.kv_len` on this device: int [B] or None."""
    return None if ctx.kv_len is None else ctx.kv_len.to(device)
