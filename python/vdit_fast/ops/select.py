"""Selection of blocks: the k largest scores, or the fewest entries that hold a share of the mass."""

from __future__ import annotations

from torch import Tensor

from ..reference import select as reference


def select_top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k largest entries of every row.

    NaN counts as larger than everything, among equal entries (also -0 and 0) the lowest index wins, and every row
    keeps at least one entry: k is clamped to [1, n]. The result is the same bit for bit on every device.

    Args:
        scores: float32 ``[..., n]``, contiguous in the last dimension, n at least 1.
        k: one number for all rows, or an integer tensor that broadcasts to ``scores.shape[:-1]`` (on the scores'
            device; it is not read back).

    Returns:
        bool, the shape of ``scores``.

    Raises:
        RuntimeError: dtype, shape or device do not fit.
    """
    return reference.select_top_k(scores, k)


def select_top_p(mass: Tensor, p: float, min_keep: int = 1) -> Tensor:
    """Mark the largest entries of every row up to and including the one at which their sum exceeds p of the row's.

    With the entries in descending order (equal ones by index), entry m stays while ``m < min_keep`` or the sum of the
    entries before it is at most ``p`` times the row's sum (Sparse VideoGen2's rule, arXiv 2505.18875). Sums are exact:
    entries count as multiples of 2^-32, rounded down, so that the result is the same bit for bit on every device. The
    largest entry always stays, and so does every NaN.

    Args:
        mass: float32 ``[..., n]``, non-negative, at most 256 each (more counts as 256; negative as 0); a softmax row
            sums to 1.
        p: share in [0, 1].
        min_keep: entries that stay in any case.

    Returns:
        bool, the shape of ``mass``.

    Raises:
        RuntimeError: dtype or shape do not fit, or p is not in [0, 1].
    """
    return reference.select_top_p(mass, p, min_keep)
