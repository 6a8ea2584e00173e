"""k-means clusters of tokens, and the order that makes them contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._no_gradient import carries_no_gradient, refuse_tangents
from .block_mean import block_mean


def kmeans_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every token: argmin over c of |c|^2 - 2 x.c, in fp32, the lowest index among equals.

    Labels carry no gradient.

    Args:
        x: ``[B, N, H, D]``, D at most 256, float32 (CPU only), bfloat16 or float16, any strides with a contiguous last
            dimension.
        centroids: float32 ``[B, H, C, D]``; rounded to x's dtype before they are compared.

    Returns:
        int32 ``[B, H, N]``. A token with NaN gets some label in range.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    return torch.ops.vdit_fast.kmeans_assign(x, centroids)


def counting_sort(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Order that brings equal labels together, lowest label first, equal ones by position; no host synchronisation.

    Args:
        labels: int32 ``[B, H, N]`` in [0, classes), any strides; others are clamped into it.
        classes: at least 1.

    Returns:
        order int32 ``[B, H, N]`` (position p of the sorted sequence holds token ``order[p]``) and the number of tokens
        per label int32 ``[B, H, classes]``.

    Raises:
        RuntimeError: dtype or shape do not fit.
    """
    return torch.ops.vdit_fast.counting_sort(labels, classes)


def permute_tokens(x: Tensor, order: Tensor, *, inverse: bool = False) -> Tensor:
    """Tokens in permuted order: ``out[:, p] = x[:, order[p]]`` per head; with ``inverse`` back to where they were.

    Differentiable in x.

    Args:
        x: ``[B, N, H, D]``, any dtype of 2 or 4 bytes, any strides with a contiguous last dimension.
        order: int32 ``[1|B, 1|H, N]``, a permutation of 0 ... N - 1. A CPU refuses entries outside this range, and with
            ``inverse`` entries that repeat; a GPU reads nothing back and gives wrong rows (with ``inverse`` those that
            the order does not name are 0).

    Returns:
        ``[B, N, H, D]`` contiguous.

    Raises:
        RuntimeError: dtypes, shapes or devices do not fit.
    """
    refuse_tangents("permute_tokens", x)
    return torch.ops.vdit_fast.permute_tokens(x, order, inverse)


carries_no_gradient("kmeans_assign", "counting_sort")


@torch.library.register_fake("vdit_fast::kmeans_assign")
def _fake_assign(x: Tensor, centroids: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=torch.int32)


@torch.library.register_fake("vdit_fast::counting_sort")
def _fake_sort(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(labels.shape), labels.new_empty((*labels.shape[:2], classes))


@torch.library.register_fake("vdit_fast::permute_tokens")
def _fake_permute(x: Tensor, order: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_permute(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, order, ctx.inverse = inputs
    ctx.save_for_backward(order)


def _permute_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (order,) = ctx.saved_tensors
    return torch.ops.vdit_fast.permute_tokens(grad.contiguous(), order, not ctx.inverse), None, None


torch.library.register_autograd("vdit_fast::permute_tokens", _permute_back, setup_context=_setup_permute)


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's iterations from given centroids; an empty cluster keeps its centroid. No host synchronisation.

    Nothing carries a gradient.

    Args:
        x: as in ``kmeans_assign``.
        centroids: float32 ``[B, H, C, D]``.
        iterations: at least 1.

    Returns:
        order int32 ``[B, H, N]`` and counts int32 ``[B, H, C]`` of the last assignment, and the centroids float32
        ``[B, H, C, D]`` after it: exactly the means of the returned clusters (Sparse VideoGen2, arXiv 2505.18875).
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    x, centroids = x.detach(), centroids.detach()
    for _ in range(iterations):
        order, counts = counting_sort(kmeans_assign(x, centroids), centroids.shape[2])
        means, _ = block_mean(x, counts, order)
        centroids = torch.where(counts[..., None] > 0, means, centroids)
    return order, counts, centroids
