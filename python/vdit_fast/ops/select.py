"""Selection of blocks: the k largest scores, or the fewest entries that hold a share of the mass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._no_gradient import carries_no_gradient


def select_top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k largest entries of every row.

    NaN counts as larger than everything, among equal entries (also -0 and 0) the lowest index wins, and every row
    keeps at least one entry: k is clamped to [1, n]. The result is the same bit for bit on every device.

    Args:
        scores: float32 ``[..., n]``, n from 1 to 2^31 - 1; copied if it is not contiguous.
        k: one number for all rows, or an int32 or int64 tensor that broadcasts to ``scores.shape[:-1]`` (on the
            scores' device; it is not read back).

    Returns:
        bool, the shape of ``scores``, contiguous. Not differentiable.

    Raises:
        RuntimeError: dtype, shape or device do not fit.
    """
    if isinstance(k, Tensor):
        return torch.ops.vdit_fast.select_top_k(scores, k.expand(scores.shape[:-1]), 1)
    return torch.ops.vdit_fast.select_top_k(scores, None, k)


def select_top_p(mass: Tensor, p: float, min_keep: int = 1) -> Tensor:
    """Mark the largest entries of every row up to and including the one at which their sum exceeds p of the row's.

    With the entries in descending order (equal ones by index), entry m stays while ``m < min_keep`` or the sum of the
    entries before it is at most ``p`` times the row's sum (Sparse VideoGen2's rule, arXiv 2505.18875). Sums are exact:
    entries count as multiples of 2^-32, rounded down, so that the result is the same bit for bit on every device. The
    largest entry always stays, and so does every NaN. A row whose entries all count as 0 (below 2^-32) keeps all of
    them, whatever p is; with p = 1 all rows keep everything, entries of 0 too: the sum never exceeds the row's.

    Args:
        mass: float32 ``[..., n]``, n from 1 to 2^23 - 1, copied if it is not contiguous; non-negative, at most 256
            each (more counts as 256; negative as 0). A softmax row sums to 1.
        p: share in [0, 1].
        min_keep: entries that stay in any case.

    Returns:
        bool, the shape of ``mass``, contiguous. Not differentiable.

    Raises:
        RuntimeError: dtype or shape do not fit, or p is not in [0, 1].
    """
    return torch.ops.vdit_fast.select_top_p(mass, p, min_keep)


carries_no_gradient("select_top_k", "select_top_p")


@torch.library.register_fake("vdit_fast::select_top_k")
def _fake_top_k(scores: Tensor, k_rows: Tensor | None, k: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.register_fake("vdit_fast::select_top_p")
def _fake_top_p(mass: Tensor, p: float, min_keep: int) -> Tensor:
    return mass.new_empty(mass.shape, dtype=torch.bool)
