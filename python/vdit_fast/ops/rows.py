"""Some rows of a sequence taken out, and put back: what subset execution does around its matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ._no_gradient import refuse_tangents, refuses_gradients


@overload
def gather_rows(x: Tensor, rows: Tensor, count: Tensor | None = None) -> Tensor: ...
@overload
def gather_rows(x: Sequence[Tensor], rows: Tensor, count: Tensor | None = None) -> list[Tensor]: ...
def gather_rows(x: Tensor | Sequence[Tensor], rows: Tensor, count: Tensor | None = None) -> Tensor | list[Tensor]:
    """The rows of x that a list names: ``out[b, i] = x[b, rows[b, i]]``. Nothing is read back to the host.

    Differentiable in x where the rows of an item are distinct.

    Args:
        x: ``[B, N, ...]`` with contiguous rows ``[...]``, any dtype and strides otherwise; or up to four such tensors
            with the same B and N, which one launch serves.
        rows: int32 ``[1|B, K]``.
        count: int32 ``[1|B]``, the number of entries in use, the first ones; None: all K. The others may hold anything.

    Returns:
        ``[B, K, ...]`` contiguous, or a list of such tensors; rows of entries that are not in use are 0. A CPU refuses
        entries in use outside [0, N), a GPU gives zeros for them.

    Raises:
        RuntimeError: dtypes, shapes, strides or devices do not fit.
    """
    many = [x] if isinstance(x, Tensor) else list(x)
    refuse_tangents("gather_rows", *many)
    found: list[Tensor] = torch.ops.vdit_fast.gather_rows(many, rows, count)
    return found[0] if isinstance(x, Tensor) else found


def scatter_rows(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    rows: Tensor,
    count: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write y into the rows of x that a list names, in place: ``x[b, rows[b, i]] = y[b, i]``, all other rows stay.

    With ``add`` the row is added to; with ``gate`` it is multiplied first. Both happen in fp32 and are rounded once.
    Nothing is read back to the host. Not differentiable (``reference.scatter_rows`` is).

    Args:
        x: ``[B, N, ...]`` with contiguous rows, any dtype and strides otherwise; or up to four such tensors with the
            same B and N, e.g. the keys and values of a cache, which one launch serves.
        y: ``[B, K, ...]`` in the dtype of its x; as many as x.
        rows: int32 ``[1|B, K]``, those in use distinct within an item.
        count: int32 ``[1|B]``, the number of entries in use, the first ones; None: all K.
        gate: ``[1|B, 1|K, 1|C]``, C the length of a row; float32 or the dtype of x, which is then float32, bfloat16 or
            float16 (also with ``add``).

    Raises:
        RuntimeError: dtypes, shapes, strides or devices do not fit, or something requires a gradient. A CPU refuses
            entries in use that repeat or lie outside [0, N); a GPU leaves the latter out, and of the former some one
            wins.
    """
    full, part = ([t] if isinstance(t, Tensor) else list(t) for t in (x, y))
    torch.ops.vdit_fast.scatter_rows(full, part, rows, count, gate, add)


@torch.library.register_fake("vdit_fast::gather_rows")
def _fake_gather(full: list[Tensor], rows: Tensor, count: Tensor | None) -> list[Tensor]:
    return [x.new_empty((x.shape[0], rows.shape[1], *x.shape[2:])) for x in full]


@torch.library.register_fake("vdit_fast::scatter_rows")
def _fake_scatter(
    full: list[Tensor], part: list[Tensor], rows: Tensor, count: Tensor | None, gate: Tensor | None, add: bool
) -> None:
    return None


def _setup_gather(ctx: Any, inputs: tuple[list[Tensor], Tensor, Tensor | None], output: list[Tensor]) -> None:
    full, rows, count = inputs
    ctx.shapes = [x.shape for x in full]
    ctx.save_for_backward(rows, count)


def _gather_back(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    rows, count = ctx.saved_tensors
    slots = torch.arange(rows.shape[1], device=rows.device)
    used = (rows >= 0) & (slots < (rows.shape[1] if count is None else count[:, None]))

    def back(grad: Tensor, shape: torch.Size) -> Tensor:  # rows may repeat: they are added up
        on = (used & (rows < shape[1])).expand(shape[0], -1)
        index = rows.long().expand(shape[0], -1).where(on, 0)
        flat = grad.flatten(2).masked_fill(~on[..., None], 0)
        wide = grad.new_zeros(shape[0], shape[1], flat.shape[2])
        return wide.scatter_add_(1, index[..., None].expand_as(flat), flat).view(shape)

    return [None if g is None else back(g, s) for g, s in zip(grads, ctx.shapes, strict=True)], None, None


torch.library.register_autograd("vdit_fast::gather_rows", _gather_back, setup_context=_setup_gather)

refuses_gradients("scatter_rows", "vdit_fast.reference.scatter_rows, which returns a new tensor")
