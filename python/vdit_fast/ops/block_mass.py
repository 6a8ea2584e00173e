"""Search passes over the scores alone: log-sum-exps of (folded) scores, attention mass between blocks, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from ._no_gradient import carries_no_gradient


def score_lse(
    q: Tensor, k: Tensor, *, scale: float | None = None, fold: int = 1, kv_len: Tensor | None = None
) -> Tensor:
    """Log-sum-exp over the keys of every (folded) query's scores, in fp32.

    With ``fold`` = s > 1 the rows are those of XAttention (arXiv 2503.16428): query i is the rows ``i s + s - 1 - r``
    and key j the rows ``j s + r``, r = 0 ... s - 1, side by side, so that a score is the sum along an antidiagonal of
    an s x s block of QK^T. Rows beyond the end, and key rows at or above ``kv_len``, count as zeros; a key without any
    valid row is not read. Not differentiable (plans carry no gradient).

    Args:
        q: ``[B, Lq, H, D]``, float32, bfloat16 or float16, contiguous last dimension, D at most 256.
        k: ``[B, Lk, Hkv, D]`` of the same dtype; H is a multiple of Hkv.
        scale: multiplies the scores; default ``D ** -0.5 / fold``.
        fold: 1 to 1024.
        kv_len: int32 or int64 ``[B]`` or None.

    Returns:
        natural logarithm float32 ``[B, H, ceil(Lq / fold)]``; -inf where no key is valid, NaN where a score is, else
        +inf where a score is.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    kv_len = None if kv_len is None else kv_len.contiguous()
    lse: Tensor = torch.ops.vdit_fast.score_lse(q, k, _scale(q, scale, fold), fold, kv_len)
    return lse


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
    partial one only changes the weights of whole rows. The value tensor is not needed. Not differentiable.

    Args:
        q, k, scale, fold, kv_len: as in ``score_lse``.
        lse: float32 ``[B, H, ceil(Lq / fold)]``; rows of -inf have weight 0. In a row of +inf finite scores have weight
            0, and a score of +inf makes its block NaN.
        q_block, kv_block: folded rows per block, at least 1.

    Returns:
        float32 ``[B, H, ceil(Nq / q_block), ceil(Nk / kv_block)]`` with Nq = ceil(Lq / fold), Nk = ceil(Lk / fold).

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    kv_len = None if kv_len is None else kv_len.contiguous()
    scale = _scale(q, scale, fold)
    mass: Tensor = torch.ops.vdit_fast.block_mass(q, k, lse.contiguous(), q_block, kv_block, scale, fold, kv_len)
    return mass


def softmax_mass(
    q: Tensor,
    k: Tensor,
    q_block: int,
    kv_block: int,
    *,
    scale: float | None = None,
    fold: int = 1,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Softmax weights of the scores, summed over blocks of queries and keys (XAttention, arXiv 2503.16428).

    `block_mass` with the log-sum-exps that `score_lse` finds for the same arguments. A CPU computes the scores once, a
    GPU twice. Not differentiable.

    Args:
        q, k, scale, fold, kv_len: as in ``score_lse``.
        q_block, kv_block: folded rows per block, at least 1.
        q_len: int32 or int64 ``[B]`` or None. Query rows at or above it count as zeros, and a query without any valid
            row has weight 0.

    Returns:
        float32 ``[B, H, ceil(Nq / q_block), ceil(Nk / kv_block)]`` with Nq = ceil(Lq / fold), Nk = ceil(Lk / fold); a
        row of blocks sums to its number of valid queries, or to 0 where no key is valid.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    q_len, kv_len = (None if n is None else n.contiguous() for n in (q_len, kv_len))
    scale = _scale(q, scale, fold)
    mass: Tensor = torch.ops.vdit_fast.softmax_mass(q, k, q_block, kv_block, scale, fold, q_len, kv_len)
    return mass


def _scale(q: Tensor, scale: float | None, fold: int) -> float:
    return max(q.shape[-1], 1) ** -0.5 / max(fold, 1) if scale is None else scale


carries_no_gradient("score_lse", "block_mass", "softmax_mass")


@torch.library.register_fake("vdit_fast::score_lse")
def _fake_score_lse(q: Tensor, k: Tensor, scale: float, fold: int, kv_len: Tensor | None) -> Tensor:
    _check_fold("score_lse", fold)
    return q.new_empty((q.shape[0], q.shape[2], _ceil_div(q.shape[1], fold)), dtype=torch.float32)


@torch.library.register_fake("vdit_fast::block_mass")
def _fake_block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, scale: float, fold: int, kv_len: Tensor | None
) -> Tensor:
    return _empty_mass("block_mass", q, k, q_block, kv_block, fold)


@torch.library.register_fake("vdit_fast::softmax_mass")
def _fake_softmax_mass(
    q: Tensor,
    k: Tensor,
    q_block: int,
    kv_block: int,
    scale: float,
    fold: int,
    q_len: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor:
    return _empty_mass("softmax_mass", q, k, q_block, kv_block, fold)


def _empty_mass(op: str, q: Tensor, k: Tensor, q_block: int, kv_block: int, fold: int) -> Tensor:
    _check_fold(op, fold)
    for name, block in (("q_block", q_block), ("kv_block", kv_block)):
        if block < 1:
            raise RuntimeError(f"vdit_fast: {op}: {name} is {block}; expected at least 1")
    rows, columns = (_ceil_div(_ceil_div(x.shape[1], fold), block) for x, block in ((q, q_block), (k, kv_block)))
    return q.new_empty((q.shape[0], q.shape[2], rows, columns), dtype=torch.float32)


def _check_fold(op: str, fold: int) -> None:
    if not 1 <= fold <= 1024:
        raise RuntimeError(f"vdit_fast: {op}: fold is {fold}; expected 1 to 1024")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
