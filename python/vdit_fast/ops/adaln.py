"""Adaptive norms of transformer blocks: modulated norm, gated residual, and both in one pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..reference import adaln as reference
from ..reference.adaln import Norm, Rounding, Table
from ._no_gradient import needs_gradient

_NORMS = ("none", "rms", "layer")
_ROUNDINGS = ("fast", "eager")


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
    """``norm(x) * (1 + scale) + shift`` in one pass: adaLN (DiT, arXiv 2212.09748) and its relatives.

    ``fast`` computes in fp32 and rounds once. ``eager`` rounds where a model's own modules do: every intermediate
    result has the dtype that torch gives it, so with 16-bit rows base + row, 1 + scale, the normed row and its product
    are rounded (HunyuanVideo, CogVideoX, LTX, Cosmos, ...), with fp32 rows nothing is before the end (Wan); an RMSNorm
    is also rounded before and after a 16-bit weight.

    Differentiable: where a gradient is needed, the plain torch twin ``vdit_fast.reference.adaln_modulate`` runs.

    Args:
        x: ``[B, N, D]`` with D from 1 to 16384, any strides with a contiguous last dimension; float32, or one 16-bit
            dtype that all 16-bit tensors of the call share.
        scale, shift: rows that modulate, float32 or 16-bit, or None. ``[D]`` or ``[1 or B, D]``: one row for all
            tokens of a batch item. ``[1 or B, R, D]``: a table, any strides with a contiguous last dimension. A pair
            ``(base, table)`` stands for the table with ``base`` (D values) added to each row, as in Wan and LTX.
            All tables have one dtype, and so have all bases.
        index: int32 ``[N]`` or ``[B, N]``: the row of every token in tables with more than one row; None if there is
            one row or one per token. A CPU refuses indices outside the table; a GPU reads nothing back and takes the
            last row instead.
        norm: ``"layer"``, ``"rms"`` or ``"none"``, over the last dimension.
        eps: added to the variance or the mean square.
        weight, bias: ``[D]``, of the norm; ``bias`` with ``"layer"`` only.
        rounding: ``"fast"`` or ``"eager"``.

    Returns:
        ``[B, N, D]`` in x's dtype, contiguous.

    Raises:
        ValueError: norm or rounding has no such value, or a table has no such shape.
        RuntimeError: shapes, dtypes, devices or indices do not fit.
    """
    if _needs_gradient(x, scale, shift, weight, bias):
        return reference.adaln_modulate(
            x, scale, shift, index=index, norm=norm, eps=eps, weight=weight, bias=bias, rounding=rounding
        )
    (scale_base, scale_rows), (shift_base, shift_rows) = _table("scale", scale), _table("shift", shift)
    return torch.ops.vdit_fast.adaln_modulate(
        x, scale_rows, shift_rows, scale_base, shift_base, index, _norm("norm", norm), eps, weight, bias,
        _eager(rounding),
    )  # fmt: skip


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
    """``x + act(gate) * post_norm(y)`` in one pass: the residual of a gated branch, also the post-norm one of Mochi
    and Lumina-Next (arXiv 2406.18583), ``x + tanh(gate) * RMSNorm(y)``.

    With ``eager`` the 16-bit results that are rounded are base + row, tanh(gate), the normed y (unless it is an RMSNorm
    without weight, which Mochi keeps in fp32), the product with a 16-bit gate, and the sum.

    Differentiable, as ``adaln_modulate``, whose rules for tables, ``index`` and ``rounding`` hold here.

    Args:
        x: ``[B, N, D]``, the residual.
        y: ``[B, N, D]``, the branch; x and y may have different dtypes (float32 and 16-bit).
        gate: table as in ``adaln_modulate``; None adds y as it is.
        gate_activation: ``"tanh"`` or None.
        post_norm, post_eps, post_weight, post_bias: the norm of y, as in ``adaln_modulate``.

    Returns:
        ``[B, N, D]`` in x's dtype, contiguous.

    Raises:
        ValueError, RuntimeError: as ``adaln_modulate``.
    """
    if _needs_gradient(x, y, gate, post_weight, post_bias):
        return reference.gate_residual(
            x, y, gate, index=index, gate_activation=gate_activation, post_norm=post_norm, post_eps=post_eps,
            post_weight=post_weight, post_bias=post_bias, rounding=rounding,
        )  # fmt: skip
    gate_base, gate_rows = _table("gate", gate)
    return torch.ops.vdit_fast.gate_residual(
        x, y, gate_rows, gate_base, index, _tanh(gate_activation), _norm("post_norm", post_norm), post_eps,
        post_weight, post_bias, _eager(rounding),
    )  # fmt: skip


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
    """``gate_residual`` and, in the same pass, ``adaln_modulate`` of its result: x and y are read once.

    ``fast`` norms the sum before it is rounded, ``eager`` the rounded one, as a model does that stores it first. One
    ``index`` serves gate, scale and shift. Arguments as in those two operators.

    Returns:
        ``(x_new, h)``, both ``[B, N, D]`` in x's dtype, contiguous.

    Raises:
        ValueError, RuntimeError: as ``adaln_modulate``.
    """
    if _needs_gradient(x, y, gate, scale, shift, post_weight, post_bias, weight, bias):
        return reference.gate_residual_norm(
            x, y, gate, scale, shift, index=index, gate_activation=gate_activation, post_norm=post_norm,
            post_eps=post_eps, post_weight=post_weight, post_bias=post_bias, norm=norm, eps=eps, weight=weight,
            bias=bias, rounding=rounding,
        )  # fmt: skip
    gate_base, gate_rows = _table("gate", gate)
    (scale_base, scale_rows), (shift_base, shift_rows) = _table("scale", scale), _table("shift", shift)
    return torch.ops.vdit_fast.gate_residual_norm(
        x, y, gate_rows, scale_rows, shift_rows, gate_base, scale_base, shift_base, index, _tanh(gate_activation),
        _norm("post_norm", post_norm), post_eps, post_weight, post_bias, _norm("norm", norm), eps, weight, bias,
        _eager(rounding),
    )  # fmt: skip


def _needs_gradient(*tensors: Table | None) -> bool:
    return needs_gradient(*(t for x in tensors for t in (x if isinstance(x, tuple) else (x,))))


def _table(name: str, table: Table | None) -> tuple[Tensor | None, Tensor | None]:
    """(base [D] or None, rows [Bt, R, D] or None)."""
    if isinstance(table, tuple) and len(table) != 2:
        raise ValueError(f"{name} is a tuple of {len(table)}; expected a tensor or a pair (base, table)")
    base, rows = table if isinstance(table, tuple) else (None, table)
    if base is not None:
        if base.dim() == 0 or base.numel() != base.shape[-1]:
            raise ValueError(f"base of {name} has shape {list(base.shape)}; expected one row [D]")
        base = base.reshape(-1)
    if rows is None or rows.dim() == 3:
        return base, rows
    if rows.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {list(rows.shape)}; expected [D], [batch, D] or [batch, rows, D]")
    return base, rows[None, None] if rows.dim() == 1 else rows[:, None]


def _choice(name: str, value: str, values: tuple[str, ...]) -> int:
    if value not in values:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, values))}")
    return values.index(value)


def _norm(name: str, value: str) -> int:
    return _choice(name, value, _NORMS)


def _eager(rounding: str) -> bool:
    return _choice("rounding", rounding, _ROUNDINGS) == 1


def _tanh(activation: str | None) -> bool:
    if activation not in (None, "tanh"):
        raise ValueError(f"gate_activation is {activation!r}; expected 'tanh' or None")
    return activation == "tanh"


def _empty_like_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("vdit_fast::adaln_modulate")
def _fake_modulate(x: Tensor, *_: Any) -> Tensor:
    return _empty_like_rows(x)


@torch.library.register_fake("vdit_fast::gate_residual")
def _fake_residual(x: Tensor, *_: Any) -> Tensor:
    return _empty_like_rows(x)


@torch.library.register_fake("vdit_fast::gate_residual_norm")
def _fake_residual_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like_rows(x), _empty_like_rows(x)


def _refuse_gradient(name: str) -> None:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"vdit_fast: {name}: the raw operator has no gradient; call vdit_fast.ops.{name}, which is differentiable"
        )

    torch.library.register_autograd(f"vdit_fast::{name}", backward)


for _name in ("adaln_modulate", "gate_residual", "gate_residual_norm"):
    _refuse_gradient(_name)
