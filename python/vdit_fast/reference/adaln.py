"""Adaptive norms of transformer blocks: modulated norm, gated residual, and both in one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["none", "rms", "layer"]
Rounding = Literal["fast", "eager"]
Table = Tensor | tuple[Tensor, Tensor]


def adaln_modulate(
    x: Tensor,
    scale: Table | None = None,
    shift: Table | None = None,
    *,
    index: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rounding: Rounding = "fast",
) -> Tensor:
    """See ``ops.adaln_modulate``; every tensor may also be fp64, and the arithmetic is fp64 where one is."""
    wide = _wide(x, weight, bias, scale, shift)
    h = _modulated(x.to(wide), x.dtype, scale, shift, index, norm, eps, weight, bias, rounding, wide)
    return h.to(x.dtype)


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Table | None = None,
    *,
    index: Tensor | None = None,
    gate_activation: Literal["tanh"] | None = None,
    post_norm: Norm = "none",
    post_eps: float = 1e-6,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    rounding: Rounding = "fast",
) -> Tensor:
    """See ``ops.gate_residual``."""
    wide = _wide(x, y, gate, post_weight, post_bias)
    post = (post_norm, post_eps, post_weight, post_bias)
    return _residual(x, y, gate, index, gate_activation, *post, rounding, wide).to(x.dtype)


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Table | None = None,
    scale: Table | None = None,
    shift: Table | None = None,
    *,
    index: Tensor | None = None,
    gate_activation: Literal["tanh"] | None = None,
    post_norm: Norm = "none",
    post_eps: float = 1e-6,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rounding: Rounding = "fast",
) -> tuple[Tensor, Tensor]:
    """See ``ops.gate_residual_norm``."""
    wide = _wide(x, y, gate, scale, shift, weight, bias, post_weight, post_bias)
    post = (post_norm, post_eps, post_weight, post_bias)
    x_new = _residual(x, y, gate, index, gate_activation, *post, rounding, wide)
    if rounding == "eager":
        x_new = x_new.to(x.dtype).to(wide)
    h = _modulated(x_new, x.dtype, scale, shift, index, norm, eps, weight, bias, rounding, wide)
    return x_new.to(x.dtype), h.to(x.dtype)


def table_rows(table: Table, tokens: int, index: Tensor | None, rounding: Rounding, wide: torch.dtype) -> Tensor:
    """Rows of a table, ``[Bt, 1 or N, D]``: base added, tokens mapped. ``eager`` rounds to the parts' common dtype."""
    base, rows = table if isinstance(table, tuple) else (None, table)
    if rows.dim() < 3:
        rows = rows.unsqueeze(-2)
    rows = rows.expand(1, *rows.shape) if rows.dim() < 3 else rows
    if rows.shape[1] not in (1, tokens) and index is None:
        raise ValueError(f"{rows.shape[1]} rows for {tokens} tokens; pass one row, one per token, or an index")
    if index is not None and rows.shape[1] != 1:
        picked = index.long().expand(max(len(rows), len(index) if index.dim() == 2 else 1), tokens)
        rows = rows.expand(len(picked), -1, -1).gather(1, picked.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
    total = rows.to(wide)
    if base is not None:
        total = total + base.reshape(-1).to(wide)
    return _rounded(total, rounding == "eager", _table_dtype(table))


def _residual(
    x: Tensor,
    y: Tensor,
    gate: Table | None,
    index: Tensor | None,
    activation: str | None,
    post_norm: Norm,
    post_eps: float,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    rounding: Rounding,
    wide: torch.dtype,
) -> Tensor:
    eager = rounding == "eager"
    branch = y.to(wide)
    if post_norm != "none":
        branch = _normed(branch, post_norm, post_eps, post_weight, post_bias, eager, wide)
        if post_norm == "layer" or (post_weight is not None and post_weight.dtype.itemsize == 2):
            branch = _rounded(branch, eager, y.dtype)
    if gate is not None:
        rows = table_rows(gate, x.shape[1], index, rounding, wide)
        if activation == "tanh":
            rows = _rounded(rows.tanh(), eager, _table_dtype(gate))
        half = _table_dtype(gate).itemsize == 2
        branch = _rounded(rows * branch, eager and half, y.dtype)
    return x.to(wide) + branch


def _modulated(
    x: Tensor,
    dtype: torch.dtype,
    scale: Table | None,
    shift: Table | None,
    index: Tensor | None,
    norm: Norm,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    rounding: Rounding,
    wide: torch.dtype,
) -> Tensor:
    eager = rounding == "eager"
    tables = [t for t in (scale, shift) if t is not None]
    half = bool(tables) and _table_dtype(tables[0]).itemsize == 2
    chain = eager and half and not (norm == "rms" and weight is not None and weight.dtype.itemsize != 2)
    h = x if norm == "none" else _normed(x, norm, eps, weight, bias, eager, wide)
    h = _rounded(h, chain, dtype)
    if scale is not None:
        factor = 1 + table_rows(scale, x.shape[1], index, rounding, wide)
        h = _rounded(h * _rounded(factor, eager, _table_dtype(scale)), chain, dtype)
    return h if shift is None else h + table_rows(shift, x.shape[1], index, rounding, wide)


def _normed(
    x: Tensor, norm: Norm, eps: float, weight: Tensor | None, bias: Tensor | None, eager: bool, wide: torch.dtype
) -> Tensor:
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    # An RMSNorm module rounds before and after a 16-bit weight, a LayerNorm module never in between.
    half = eager and norm == "rms" and weight is not None and weight.dtype.itemsize == 2
    if weight is not None:
        x = _rounded(_rounded(x, half, weight.dtype) * weight.to(wide), half, weight.dtype)
    return x if bias is None else x + bias.to(wide)


def _rounded(x: Tensor, on: bool, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype) if on else x


def _table_dtype(table: Table) -> torch.dtype:
    """What torch gives base + row."""
    return torch.promote_types(*(t.dtype for t in table)) if isinstance(table, tuple) else table.dtype


def _wide(*tensors: Table | None) -> torch.dtype:
    flat = [t for x in tensors for t in (x if isinstance(x, tuple) else (x,)) if t is not None]
    return torch.float64 if any(t.dtype == torch.float64 for t in flat) else torch.float32
