"""Matrix products of neighbouring groups of rows, each with a weight of its own; group sizes lie on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["group_by_group", "grouped_linear", "has_grouped_gemm", "say_once"]

logger = logging.getLogger("vdit_fast")

_grouped_mm: Any = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_told: set[str] = set()


def has_grouped_gemm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped GEMM serves this product without a host read: bfloat16 on a GPU of compute capability
    8.0 or more, rows of both operands and of the result at multiples of 16 bytes.

    Elsewhere torch loops over the groups itself, with a host read of their sizes.
    """
    if x.device.type != "cuda" or _grouped_mm is None:
        return False
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    strides = (x.stride(-2), weight.stride(-2), weight.shape[-2])
    starts = (x.data_ptr(), weight.data_ptr())
    contiguous = x.stride(-1) == 1 and weight.stride(-1) == 1
    return contiguous and all(stride % 8 == 0 for stride in strides) and all(start % 16 == 0 for start in starts)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``x[rows of group e] @ weight[e].T`` for every group.

    One kernel without host synchronisation where ``has_grouped_gemm`` says so. Elsewhere one product per group that is
    not empty, whose sizes the host must know: free on a CPU, a synchronisation on a GPU, which is logged once.
    Differentiable in x and weight.

    Args:
        x: ``[T, in]``; the groups' rows follow one another.
        weight: ``[E, out, in]`` in x's dtype.
        counts: int32 ``[E]``: rows of every group, on x's device. Rows beyond their sum belong to none.

    Returns:
        ``[T, out]``; rows that belong to no group hold anything.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"grouped_linear: x has shape {list(x.shape)} and weight {list(weight.shape)}; expected [T, in] and "
            "[E, out, in]"
        )
    if counts.shape != weight.shape[:1] or counts.dtype != torch.int32:
        raise ValueError(
            f"grouped_linear: counts is {counts.dtype} {list(counts.shape)}; expected torch.int32 [{weight.shape[0]}]"
        )
    if x.dtype != weight.dtype or not x.device == weight.device == counts.device:
        raise ValueError(
            f"grouped_linear: x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}, counts on "
            f"{counts.device}; convert them to one dtype and device"
        )
    if has_grouped_gemm(x, weight):
        out: Tensor = _grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
        return out
    return group_by_group(x, counts, weight.shape[1], lambda group, rows: rows @ weight[group].T)


def group_by_group(x: Tensor, counts: Tensor, width: int, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``function(group, its rows)`` for every group that has rows: the host must know the sizes.

    Args:
        x, counts: as in ``grouped_linear``.
        width: columns of the function's result, in x's dtype.

    Returns:
        ``[T, width]``; rows that belong to no group hold anything.
    """
    if x.device.type != "cpu":
        say_once(f"groups of rows wait for the host: no grouped GEMM for {x.dtype} of width {x.shape[1]}")
    sizes = counts.tolist()
    results, start, out = [], 0, None
    for group, size in enumerate(sizes):
        if not size:
            continue
        result = function(group, x[start : start + size])
        if result.requires_grad:
            results.append(result)
        else:
            out = x.new_empty(x.shape[0], width) if out is None else out
            out[start : start + size] = result
        start += size
    if results:
        return torch.cat([*results, x.new_zeros(x.shape[0] - start, width)])
    return x.new_empty(x.shape[0], width) if out is None else out


def say_once(text: str) -> None:
    """A warning in the log, the first time."""
    if text not in _told:
        _told.add(text)
        logger.warning("vdit_fast: %s (said once)", text)
