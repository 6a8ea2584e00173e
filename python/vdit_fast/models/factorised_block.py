"""The blocks of Stable Video Diffusion, AnimateDiff and Latte through fused operators.

One class of diffusers makes most of them, with modulation (Latte) or plain norms; image models use it too, but only the
models of the family get here. The temporal block of Stable Video Diffusion is a class of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm
from vdit_fast.reference.adaln import Table

__all__ = ["FACTORISED_BLOCKS"]

_CHUNKS = "its feed-forward runs in chunks"


def _affine(norm: Any) -> dict[str, Any]:
    return {"eps": norm.eps, "weight": norm.weight, "bias": norm.bias}


def _special(block: Any, x: Tensor, told: dict[str, Any] | None) -> str | None:
    """Why a block cannot be fused as it is called, or None."""
    if block.norm_type not in ("ada_norm_single", "layer_norm"):
        return f"norms of the type {block.norm_type!r} are not fused"
    if block._chunk_size is not None:
        return _CHUNKS
    if told and any(told.get(name) is not None for name in ("gligen", "scale")):
        return "its attention is told a scale or GLIGEN's objects"
    return None if x.ndim == 3 else f"its input has {x.ndim} dimensions"


def _modulated(
    block: Any, x: Tensor, temb: Tensor, told: dict[str, Any], text: dict[str, Any], rounding: Any
) -> Tensor:
    """With a row of modulation per sequence; the second norm is that of the feed-forward."""
    table = block.scale_shift_table
    rows = zip(table.unbind(0), temb.unflatten(-1, table.shape).unbind(1), strict=True)
    gate: Table | None
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows
    h = adaln_modulate(x, scale, shift, **_affine(block.norm1), rounding=rounding)
    y = block.attn1(h if block.pos_embed is None else block.pos_embed(h), **told)
    if block.attn2 is not None:
        x = gate_residual(x, y, gate, rounding=rounding)
        y, gate = block.attn2(x, **text), None
    x, h = gate_residual_norm(x, y, gate, mlp_scale, mlp_shift, **_affine(block.norm2), rounding=rounding)
    return gate_residual(x, block.ff(h), mlp_gate, rounding=rounding)


def _plain(block: Any, x: Tensor, told: dict[str, Any], text: dict[str, Any], rounding: Any) -> Tensor:
    h = adaln_modulate(x, **_affine(block.norm1), rounding=rounding)
    y = block.attn1(h if block.pos_embed is None else block.pos_embed(h), **told)
    if block.attn2 is not None:
        x, h = gate_residual_norm(x, y, **_affine(block.norm2), rounding=rounding)
        y = block.attn2(h if block.pos_embed is None else block.pos_embed(h), **text)
    x, h = gate_residual_norm(x, y, **_affine(block.norm3), rounding=rounding)
    return gate_residual(x, block.ff(h), rounding=rounding)


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        reason = _special(self, hidden_states, cross_attention_kwargs)
        modulated = self.norm_type == "ada_norm_single"
        norms = (self.norm1, self.norm2) if modulated else (self.norm1, self.norm2, self.norm3)
        present = [norm for norm in norms if norm is not None] if reason is None else []
        tables = (self.scale_shift_table,) if modulated else ()
        rounding = fused_rounding(self, hidden_states, present, ("LayerNorm",), *tables, reason=reason)
        if rounding is None:
            return stock_forward(self)(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        x = as_rows(hidden_states)
        more = {name: given for name, given in (cross_attention_kwargs or {}).items() if name != "gligen"}
        own = encoder_hidden_states if self.only_cross_attention else None
        told = {"encoder_hidden_states": own, "attention_mask": attention_mask, **more}
        text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask, **more}
        if modulated:
            return _modulated(self, x, timestep, told, text, rounding)
        return _plain(self, x, told, text, rounding)

    return forward


def _temporal() -> BlockForward:
    def forward(
        self: Any, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        norms = [norm for norm in (self.norm_in, self.norm1, self.norm2, self.norm3) if norm is not None]
        reason = None if self._chunk_size is None else _CHUNKS
        rounding = fused_rounding(self, hidden_states, norms, ("LayerNorm",), reason=reason)
        if rounding is None:
            return stock_forward(self)(hidden_states, num_frames, encoder_hidden_states)
        places = hidden_states.shape[1]
        x = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)
        y = self.ff_in(adaln_modulate(as_rows(x), **_affine(self.norm_in), rounding=rounding))
        if self.is_res:
            x, h = gate_residual_norm(as_rows(x), y, **_affine(self.norm1), rounding=rounding)
        else:
            x, h = y, adaln_modulate(y, **_affine(self.norm1), rounding=rounding)
        y = self.attn1(h, encoder_hidden_states=None)
        if self.attn2 is not None:
            x, h = gate_residual_norm(x, y, **_affine(self.norm2), rounding=rounding)
            y = self.attn2(h, encoder_hidden_states=encoder_hidden_states)
        x, h = gate_residual_norm(x, y, **_affine(self.norm3), rounding=rounding)
        y = self.ff(h)
        x = gate_residual(x, y, rounding=rounding) if self.is_res else y
        return x.unflatten(0, (-1, places)).transpose(1, 2).flatten(0, 1)

    return forward


FACTORISED_BLOCKS: dict[str, BlockForward] = {
    "BasicTransformerBlock": _block(),
    "TemporalBasicTransformerBlock": _temporal(),
}
