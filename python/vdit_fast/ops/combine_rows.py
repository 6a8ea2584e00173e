"""Rows added up by weight: what a token gets back from its experts, or from a branch that only some tokens took."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.combine_rows import combine_rows as plain_combine_rows
from ._no_gradient import needs_gradient


def combine_rows(
    rows: Tensor,
    slots: Tensor,
    weights: Tensor | None = None,
    *,
    base: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``residual + gate * (base + sum_j weights[:, j] * rows[slots[:, j]])`` in one pass.

    Every row of the result gathers its own operands, so there are no atomics and the sum has one order: base first,
    then by j. Sums are fp32 and rounded once. It ends a mixture of experts (DiT-MoE, arXiv 2407.11633: K experts' rows
    by the router's weights, the shared expert as base) and a branch that only some tokens take (DyDiT, arXiv
    2410.03456: one slot, -1 for tokens that do not).

    Differentiable: where a gradient is needed, the plain torch twin ``vdit_fast.reference.combine_rows`` runs.

    Args:
        rows: ``[M, C]``, float32, bfloat16 or float16, any stride with contiguous columns. Rows that are multiples of
            16 bytes and lie at them are fast on a GPU.
        slots: int32 ``[N, K]``, contiguous, K from 1 to 8: which rows; negative ones count for nothing. A CPU refuses
            slots from M on; a GPU reads nothing back and leaves them out.
        weights: float32 ``[N, K]``, contiguous, or None for ones.
        base, residual: ``[N, C]`` in the dtype of rows, or None.
        gate: ``[G, C]`` in the dtype of rows, one row for each of G equal parts of the N rows (of each batch item), or
            None.

    Returns:
        ``[N, C]`` in the dtype of rows, contiguous. A row without base and slots is its residual, bit for bit, or 0.

    Raises:
        RuntimeError: shapes, dtypes, devices, strides or slots do not fit.
    """
    if needs_gradient(rows, weights, base, residual, gate):
        return plain_combine_rows(rows, slots, weights, base=base, residual=residual, gate=gate)
    return torch.ops.vdit_fast.combine_rows(rows, slots, weights, base, residual, gate)


@torch.library.register_fake("vdit_fast::combine_rows")
def _fake(rows: Tensor, slots: Tensor, *_: Any) -> Tensor:
    return rows.new_empty((slots.shape[0], rows.shape[1]))


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "vdit_fast: combine_rows: the raw operator has no gradient; call vdit_fast.ops.combine_rows, which is "
        "differentiable"
    )


torch.library.register_autograd("vdit_fast::combine_rows", _refuse)
