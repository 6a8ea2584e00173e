"""Numbers per block of tokens: means, log-sum-exps of folded scores, attention mass between blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import blocks as reference


def block_mean(
    x: Tensor, lengths: Tensor, order: Tensor | None = None, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every block, accumulated in fp32 in a fixed order.

    Block i holds the next ``lengths[i]`` tokens of the (permuted) sequence; tokens beyond the last block belong to
    none. Not differentiable (plans carry no gradient). A GPU reads nothing back to check it: there lengths are clamped to
    what is left of the sequence, and order entries outside [0, N) are left out; a CPU refuses both.

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
    return torch.ops.vdit_fast.block_mean(x.detach(), lengths, order, kv_len)


@torch.library.register_fake("vdit_fast::block_mean")
def _fake_mean(x: Tensor, lengths: Tensor, order: Tensor | None, kv_len: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = x.shape
    blocks = lengths.shape[-1]
    return (
        x.new_empty((batch, heads, blocks, dim), dtype=torch.float32),
        x.new_empty((batch, heads, blocks), dtype=torch.int32),
    )


def score_lse(
    q: Tensor, k: Tensor, *, scale: float | None = None, fold: int = 1, kv_len: Tensor | None = None
) -> Tensor:
    """Log-sum-exp over the keys of every (folded) query's scores, in fp32.

    With ``fold`` = s > 1 the rows are those of XAttention (arXiv 2503.16428): query i is the rows ``i s + s - 1 - r``
    and key j the rows ``j s + r``, r = 0 ... s - 1, side by side, so that a score is the sum along an antidiagonal of
    an s x s block of QK^T. Rows beyond the end, and key rows at or above ``kv_len``, count as zeros; a key without any
    valid row is not read.

    Args:
        q: ``[B, Lq, H, D]``, float32, bfloat16 or float16, contiguous last dimension, D at most 256.
        k: ``[B, Lk, Hkv, D]`` of the same dtype; H is a multiple of Hkv.
        scale: multiplies the scores; default ``D ** -0.5 / fold``.
        fold: at least 1.
        kv_len: int32 or int64 ``[B]`` or None.

    Returns:
        natural logarithm float32 ``[B, H, ceil(Lq / fold)]``; -inf where no key is valid.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    return reference.score_lse(q, k, scale=scale, fold=fold, kv_len=kv_len)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_block: int,
    kv_block: int,
    *,
    scale: float | None = None,
    fold: int = 1,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Attention weights exp(score - lse), summed over blocks of queries and keys (AdaSpa's search, arXiv 2502.21079).

    With the exact ``lse`` of these keys the entries of a block row sum to its number of (folded) queries. A stale or
    partial one only changes the weights of whole rows. The value tensor is not needed.

    Args:
        q, k, scale, fold, kv_len: as in ``score_lse``.
        lse: float32 ``[B, H, ceil(Lq / fold)]``; rows of -inf have weight 0.
        q_block, kv_block: folded rows per block, at least 1.

    Returns:
        float32 ``[B, H, ceil(Nq / q_block), ceil(Nk / kv_block)]`` with Nq = ceil(Lq / fold), Nk = ceil(Lk / fold).

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    return reference.block_mass(q, k, lse, q_block, kv_block, scale=scale, fold=fold, kv_len=kv_len)
