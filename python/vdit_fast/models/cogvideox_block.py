"""The blocks of CogVideoX and ConsisID through fused operators.

Text and video have rows of their own in the modulation, but one norm and one feed-forward: both streams run as one
buffer [text, video] with a table of two rows, so that nothing is concatenated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.joint import join
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["COGVIDEOX_BLOCKS"]


def _tables(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """shift, scale, gate: [B, 2, D], the text's row and the video's."""
    rows: Tensor = norm.linear(norm.silu(temb))
    return rows.unflatten(1, (2, 3, -1)).flip(1).unbind(2)


def _affine(norm: Any) -> dict[str, Any]:
    return {"eps": norm.norm.eps, "weight": norm.norm.weight, "bias": norm.norm.bias}


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        norms = (self.norm1, self.norm1.norm, self.norm2, self.norm2.norm)
        rounding = fused_rounding(self, hidden_states, norms)
        if rounding is None:
            streams = (hidden_states, encoder_hidden_states)
            return stock_forward(self)(*streams, temb, image_rotary_emb, attention_kwargs)
        text = encoder_hidden_states.shape[1]
        x = as_rows(join(encoder_hidden_states, hidden_states))
        index = (torch.arange(x.shape[1], device=x.device) >= text).to(torch.int32)
        shift, scale, gate = _tables(self.norm1, temb)
        mlp_shift, mlp_scale, mlp_gate = _tables(self.norm2, temb)
        h = adaln_modulate(x, scale, shift, index=index, **_affine(self.norm1), rounding=rounding)
        y, text_y = self.attn1(
            hidden_states=h[:, text:],
            encoder_hidden_states=h[:, :text],
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        modulation = {"index": index, **_affine(self.norm2), "rounding": rounding}
        x, h = gate_residual_norm(x, join(text_y, y), gate, mlp_scale, mlp_shift, **modulation)
        x = gate_residual(x, self.ff(h), mlp_gate, index=index, rounding=rounding)
        return x[:, text:], x[:, :text]

    return forward


COGVIDEOX_BLOCKS: dict[str, BlockForward] = {"CogVideoXBlock": _block()}
