"""QK norm, RoPE and placement of q, k and v in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdit_fast.reference.qk_norm_rope import NORMS, scatter_rows
from vdit_fast.reference.qk_norm_rope import qk_norm_rope as one_stream

from ._no_gradient import needs_gradient, refuses_gradients

_ROUNDINGS = ("fast", "eager")
_LAYOUTS = ("interleaved", "half")


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    norm: str = "none",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    relu: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    rope: str = "interleaved",
    rotary_dim: int | None = None,
    axes: Sequence[int] | None = None,
    positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    rope_start: int | None = None,
    k_rope_start: int | None = None,
    q_rows: Tensor | None = None,
    kv_rows: Tensor | None = None,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    rounding: str = "fast",
    round_before_weight: bool = False,
    round_products: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalises q and k, rotates them by position, and writes q, k and v where attention reads them: one pass.

    Arithmetic is fp32. With a gradient to compute, the differentiable reference runs instead of the kernel.

    Args:
        q, k, v: ``[B, N, H, D]`` of one dtype (float32, bfloat16, float16), any strides with a contiguous last
            dimension; N and H of each may differ. k and v may be left out. v is copied only.
        norm: ``"none"``; ``"rms"``: RMSNorm over each head's D; ``"rms_across"``: over all H·D channels of a token;
            ``"layer"``: LayerNorm over D.
        q_weight, k_weight, q_bias, k_bias: ``[D]``, or ``[H * D]`` for ``"rms_across"``; float32 or 16 bits.
        eps: added to the mean square.
        relu: negative results of the norm become 0, before RoPE (linear attention of Sana-Video).
        cos, sin: the table of angles, ``[rows, W]``, ``[1|B, rows, W]`` or ``[1|B, rows, 1|H, W]``, of any dtype that q
            may have. W is ``rotary_dim`` (a value per channel) or its half (a value per pair). None: no rotation.
        k_cos, k_sin: k's table; that of q by default.
        rope: which channels make a pair: ``"interleaved"``: 2i and 2i + 1; ``"half"``: i and i + width / 2 within each
            of ``axes``.
        rotary_dim: the first channels of a head rotate, the others do not; the sum of ``axes``, or D, by default.
        axes: widths of up to four axes for ``"half"``; one axis of ``rotary_dim`` by default.
        positions, k_positions: int32 ``[N]``, ``[1|B, N]`` or ``[1|B, 1|H, N]``, the row of the table for every token;
            -1: not rotated. A CPU refuses other entries outside the table, a GPU does not rotate them.
        rope_start, k_rope_start: without positions, token ``rope_start + r`` takes row r, and tokens beyond the table
            are not rotated. By default the table must have a row for every token. Positions or start of q serve k too
            where k has neither.
        q_rows, kv_rows: int32, shapes as of ``positions``: the row of the destination that a token goes to, each at
            most once (the inverse of a permutation ``order``: ``out[inverse[n]] = f(x[n])``). A CPU refuses entries
            outside the destination, a GPU leaves such tokens out.
        q_out, k_out, v_out: destinations ``[B, N, H, D]`` of q's dtype, any strides with a contiguous last dimension,
            for instance slices of a joint buffer; with rows any number of tokens. They may be the inputs themselves
            (without rows), but must not overlap them or each other otherwise. New contiguous tensors by default, where
            rows that no token goes to are 0.
        rounding: ``"fast"``: one rounding at the end; ``"eager"``: also where the models round: after the norm.
        round_before_weight: with ``"eager"``: as ``diffusers.models.normalization.RMSNorm``, which rounds before the
            weight and after it, and with float32 weights not at all. Otherwise as torch's norms: once, at their end.
        round_products: with ``"eager"``: RoPE's two products are rounded before they are added, as in models that
            rotate in the dtype of a 16-bit table.

    Returns:
        q, k and v as written (the destinations where they are given); None for what is left out.

    Raises:
        ValueError: an unknown name, or a table that does not fit.
        RuntimeError: shapes, dtypes, strides or devices do not fit.
    """
    _check_names(norm, rope, rounding)
    if axes is not None and rope != "half":
        raise ValueError(f'axes is {tuple(axes)}, but rope is {rope!r}; axes belong to rope="half"')
    if (cos is None) != (sin is None) or (k_cos is None) != (k_sin is None):
        raise ValueError("cos and sin come together, and so do k_cos and k_sin")
    if rotary_dim is None:
        rotary_dim = sum(axes) if axes is not None else q.shape[-1]
    turns = cos is not None or k_cos is not None
    rotary = rotary_dim if turns else 0
    if rotary % 2:
        raise ValueError(f"{rotary} channels cannot be rotated in pairs; pass an even rotary_dim")
    widths = [] if rope == "interleaved" or not turns else [rotary] if axes is None else list(axes)

    if k_cos is None:
        k_cos, k_sin = cos, sin
    if k_positions is None and k_rope_start is None:
        k_positions, k_rope_start = positions, rope_start
    q_table = _table(q, "q", cos, sin, positions, rope_start)
    k_table = _table(k, "k", k_cos, k_sin, k_positions, k_rope_start) if k is not None else _NOTHING
    q_rows, kv_rows = _per_token(q_rows, "q_rows"), _per_token(kv_rows, "kv_rows")

    tensors = (q, k, v, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin, q_out, k_out, v_out)
    if needs_gradient(*tensors):
        common: dict[str, Any] = {
            "norm": norm, "eps": eps, "relu": relu, "rotary": rotary, "axes": widths, "rounding": rounding,
            "round_before_weight": round_before_weight, "round_products": round_products,
        }  # fmt: skip
        new_q = one_stream(q, weight=q_weight, bias=q_bias, **_named(q_table), **common)
        new_q = scatter_rows(new_q, q_rows, q_out)
        new_k = new_v = None
        if k is not None:
            new_k = one_stream(k, weight=k_weight, bias=k_bias, **_named(k_table), **common)
            new_k = scatter_rows(new_k, kv_rows, k_out)
        if v is not None:
            new_v = scatter_rows(v, kv_rows, v_out) if kv_rows is not None or v_out is not None else v.clone()
        return new_q, new_k, new_v

    q_out = _destination(q, q_rows, q_out)
    k_out = _destination(k, kv_rows, k_out) if k is not None else k_out
    v_out = _destination(v, kv_rows, v_out) if v is not None else v_out
    code = 0 if rounding == "fast" or (norm == "none" and not round_products) else 2 if round_before_weight else 1
    torch.ops.vdit_fast.qk_norm_rope(
        q, k, v, q_weight, q_bias, k_weight, k_bias, q_table[0], q_table[1], k_table[0], k_table[1], q_table[2],
        k_table[2], q_rows, kv_rows, NORMS.index(norm), eps, rotary, widths, q_table[3], k_table[3], code,
        round_products, relu, q_out, k_out, v_out,
    )  # fmt: skip
    return q_out, k_out, v_out


_Table = tuple[Tensor | None, Tensor | None, Tensor | None, int]
_NOTHING: _Table = (None, None, None, 0)


def _named(table: _Table) -> dict[str, Any]:
    return dict(zip(("cos", "sin", "positions", "start"), table, strict=True))


def _check_names(norm: str, rope: str, rounding: str) -> None:
    for name, value, known in (
        ("norm", norm, NORMS),
        ("rope", rope, _LAYOUTS),
        ("rounding", rounding, _ROUNDINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _per_token(t: Tensor | None, name: str) -> Tensor | None:
    """[N], [B, N] or [B, H, N] as the latter."""
    if t is None or t.dim() == 3:
        return t
    if t.dim() not in (1, 2):
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}; expected [tokens], [batch, tokens] or [batch, heads, tokens]"
        )
    return t.view(1, 1, -1) if t.dim() == 1 else t.unsqueeze(1)


def _table(
    x: Tensor, name: str, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, start: int | None
) -> _Table:
    if cos is None or sin is None:
        if positions is not None or start is not None:
            raise ValueError(f"{name} has positions or a rope_start, but no table; pass cos and sin")
        return _NOTHING
    wide = []
    for t in (cos, sin):
        if t.dim() not in (2, 3, 4):
            raise ValueError(
                f"the table of {name} has shape {tuple(t.shape)}; expected [rows, width], [batch, rows, width] or "
                "[batch, rows, heads, width]"
            )
        wide.append(t[None, :, None] if t.dim() == 2 else t.unsqueeze(2) if t.dim() == 3 else t)
    if positions is not None and start is not None:
        raise ValueError("positions and rope_start exclude each other; pass one of them")
    if positions is None and start is None and wide[0].shape[1] != x.shape[1]:
        raise ValueError(
            f"the table of {name} has {wide[0].shape[1]} rows for {x.shape[1]} tokens; pass rope_start for a range of "
            "tokens, or positions"
        )
    return wide[0], wide[1], _per_token(positions, "positions"), start or 0


def _destination(x: Tensor, rows: Tensor | None, out: Tensor | None) -> Tensor:
    if out is not None:
        return out
    # A row that no token goes to must not be left as it was found.
    return x.new_empty(x.shape) if rows is None else x.new_zeros(x.shape)


@torch.library.register_fake("vdit_fast::qk_norm_rope")
def _fake(*_: Any) -> None:
    return None


refuses_gradients("qk_norm_rope", "vdit_fast.ops.qk_norm_rope, which then runs its differentiable reference")
