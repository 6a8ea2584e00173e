"""The blocks of HunyuanVideo and HunyuanVideo-1.5 through fused operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.joint import join
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["HUNYUAN_BLOCKS"]


def _modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """The rows [B, D] an adaptive norm makes of the timestep: shift, scale, gate, and a dual block's second three."""
    rows: Tensor = norm.linear(norm.silu(temb))
    return rows.chunk(rows.shape[1] // norm.norm.normalized_shape[0], dim=1)


def _dual() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        first, second = (self.norm1, self.norm1_context), (self.norm2, self.norm2_context)
        norms = (*first, *(norm.norm for norm in first), *second)
        rounding = fused_rounding(self, hidden_states, norms)
        if rounding is None:
            streams = (hidden_states, encoder_hidden_states)
            return stock_forward(self)(*streams, temb, attention_mask, freqs_cis, *args, **kwargs)
        rows, text_rows = _modulation(self.norm1, temb), _modulation(self.norm1_context, temb)
        x, text = as_rows(hidden_states), as_rows(encoder_hidden_states)
        h = adaln_modulate(x, rows[1], rows[0], eps=self.norm1.norm.eps, rounding=rounding)
        text_h = adaln_modulate(text, text_rows[1], text_rows[0], eps=self.norm1_context.norm.eps, rounding=rounding)
        y, text_y = self.attn(
            hidden_states=h, encoder_hidden_states=text_h, attention_mask=attention_mask, image_rotary_emb=freqs_cis
        )
        return (
            _second_half(x, y, rows, self.norm2, self.ff, rounding),
            _second_half(text, text_y, text_rows, self.norm2_context, self.ff_context, rounding),
        )

    return forward


def _second_half(x: Tensor, y: Tensor, rows: tuple[Tensor, ...], norm: Any, mlp: Any, rounding: Any) -> Tensor:
    _, _, gate, shift, scale, mlp_gate = rows
    x, h = gate_residual_norm(x, y, gate, scale, shift, eps=norm.eps, rounding=rounding)
    return gate_residual(x, mlp(h), mlp_gate, rounding=rounding)


def _single() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        rounding = fused_rounding(self, hidden_states, (self.norm, self.norm.norm))
        if rounding is None:
            streams = (hidden_states, encoder_hidden_states)
            return stock_forward(self)(*streams, temb, attention_mask, image_rotary_emb, *args, **kwargs)
        video = hidden_states.shape[1]
        shift, scale, gate = _modulation(self.norm, temb)
        x = as_rows(join(hidden_states, encoder_hidden_states))
        h = adaln_modulate(x, scale, shift, eps=self.norm.norm.eps, rounding=rounding)
        mlp = self.act_mlp(self.proj_mlp(h))
        y, text_y = self.attn(
            hidden_states=h[:, :video],
            encoder_hidden_states=h[:, video:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        y = self.proj_out(torch.cat((join(y, text_y), mlp), dim=2))
        x = gate_residual(x, y, gate, rounding=rounding)
        return x[:, :video], x[:, video:]

    return forward


HUNYUAN_BLOCKS: dict[str, BlockForward] = {
    "HunyuanVideoTransformerBlock": _dual(),
    "HunyuanVideoSingleTransformerBlock": _single(),
    "HunyuanVideo15TransformerBlock": _dual(),
}
