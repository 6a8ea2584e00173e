"""Means of blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._no_gradient import carries_no_gradient


def block_mean(
    x: Tensor, lengths: Tensor, order: Tensor | None = None, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every block, accumulated in fp32 in a fixed order.

    Block i holds the next ``lengths[i]`` tokens of the (permuted) sequence; tokens beyond the last block belong to
    none. Not differentiable (plans carry no gradient). A CPU refuses lengths and orders that do not fit; a GPU reads
    nothing back: it clamps lengths to what is left of the sequence and leaves out order entries outside [0, N).

    Args:
        x: ``[B, N, H, D]``, float32, bfloat16 or float16, any strides with a contiguous last dimension.
        lengths: int32 or int64 ``[1|B, 1|H, n]``, zero allowed, summing to at most N.
        order: int32 ``[1|B, 1|H, N]`` or None; position p of the permuted sequence holds token ``order[p]``.
        kv_len: int32 or int64 ``[B]`` or None; tokens of original index at or above it are left out.

    Returns:
        means float32 ``[B, H, n, D]`` (0 for an empty block) and the numbers of averaged tokens int32 ``[B, H, n]``.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    return torch.ops.vdit_fast.block_mean(x, lengths, order, kv_len)


carries_no_gradient("block_mean")


@torch.library.register_fake("vdit_fast::block_mean")
def _fake(x: Tensor, lengths: Tensor, order: Tensor | None, kv_len: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = x.shape
    blocks = lengths.shape[-1]
    return (
        x.new_empty((batch, heads, blocks, dim), dtype=torch.float32),
        x.new_empty((batch, heads, blocks), dtype=torch.int32),
    )
