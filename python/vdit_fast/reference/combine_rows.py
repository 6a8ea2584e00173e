"""Rows added up by weight, and the residual of the branch they make."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_rows(
    rows: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``residual + gate * (base + sum_j weights[:, j] * rows[slots[:, j]])``, summed in fp32 (fp64 for fp64).

    Args:
        rows: ``[M, C]``.
        slots: int32 ``[N, K]``; negative ones count for nothing.
        weights: ``[N, K]``, or None for ones.
        base, residual: ``[N, C]`` or None.
        gate: ``[G, C]``, one row for each of G equal parts of the N rows, or None.

    Returns:
        ``[N, C]`` in the dtype of rows. A row without base and slots is its residual.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    present = slots >= 0
    if slots.is_cuda:
        present = present & (slots < rows.shape[0])  # as the operator: nothing is read back
    total = rows.new_zeros(slots.shape[0], rows.shape[1], dtype=dtype) if base is None else base.to(dtype)
    for j in range(slots.shape[1]):
        row = rows.new_zeros(total.shape, dtype=dtype)
        on = present[:, j, None]
        if rows.shape[0]:
            row = torch.where(on, rows.index_select(0, slots[:, j].where(present[:, j], 0)).to(dtype), 0)
        if weights is not None:
            row = row * torch.where(on, weights[:, j, None].to(dtype), 0)  # 0 * nan would reach the gradients
        total = total + row
    if gate is not None:
        total = total * gate.to(dtype).repeat_interleave(slots.shape[0] // max(1, gate.shape[0]), 0)
    if base is None:
        total = torch.where(present.any(1, keepdim=True), total, 0)
    if residual is not None:
        total = total + residual.to(dtype)
    return total.to(rows.dtype)
