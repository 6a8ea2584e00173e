"""Some rows of a sequence taken out, and put back."""

from __future__ import annotations

import torch
from torch import Tensor


def _in_use(rows: Tensor, count: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """Rows int64 [B, K], 0 where not in use, and which are."""
    slots = torch.arange(rows.shape[1], device=rows.device)
    used = slots < (rows.shape[1] if count is None else count[:, None])
    used = used.expand(batch, -1)
    return rows.long().expand(batch, -1).where(used, 0), used


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """index [B, K] for every element of the rows of x [B, N, ...]."""
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def gather_rows(x: Tensor, rows: Tensor, count: Tensor | None = None) -> Tensor:
    """See ``ops.gather_rows``."""
    index, used = _in_use(rows, count, x.shape[0])
    return x.gather(1, _wide(index, x)).where(_wide(used, x), 0)


def scatter_rows(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    count: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """See ``ops.scatter_rows``; returns a new tensor. fp64 stays fp64."""
    index, used = _in_use(rows, count, x.shape[0])
    new = y
    if gate is not None or add:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        new = y.to(dtype)
        if gate is not None:
            new = (new.flatten(2) * gate.to(dtype)).view(y.shape)
        if add:
            new = new + x.gather(1, _wide(index, x)).to(dtype)
        new = new.to(x.dtype)
    item = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(index)[used]
    return x.index_put((item, index[used]), new[used])
