"""The blocks of HunyuanVideo and HunyuanVideo-1.5 through fused operators.

Image-to-video by token replacement gives the first frame's tokens rows of their own in the modulation: a table of two
rows and an index, where the model cuts the stream in two and joins it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.joint import join
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["HUNYUAN_BLOCKS"]


def _modulation(norm: Any, temb: Tensor, first: Tensor | None = None) -> tuple[Tensor, ...]:
    """What an adaptive norm makes of the timestep: shift, scale, gate, and a dual block's second three; rows [B, D], or
    tables [B, 2, D] of the first frame and the rest."""
    rows: Tensor = norm.linear(norm.silu(temb))
    parts = rows.shape[1] // norm.norm.normalized_shape[0]
    if first is not None:
        rows = torch.stack((norm.linear(norm.silu(first)), rows), dim=1)
    return rows.chunk(parts, dim=-1)


def _index(x: Tensor, first_tokens: int | None) -> Tensor | None:
    """int32 [N]: 0 for the first frame's tokens, 1 for the others."""
    if first_tokens is None:
        return None
    return (torch.arange(x.shape[1], device=x.device) >= first_tokens).to(torch.int32)


def _second_half(
    x: Tensor, y: Tensor, rows: tuple[Tensor, ...], index: Tensor | None, norm: Any, mlp: Any, rounding: Any
) -> Tensor:
    _, _, gate, shift, scale, mlp_gate = rows
    x, h = gate_residual_norm(x, y, gate, scale, shift, index=index, eps=norm.eps, rounding=rounding)
    return gate_residual(x, mlp(h), mlp_gate, index=index, rounding=rounding)


def _run_dual(
    block: Any, x: Tensor, text: Tensor, rows: tuple[Tensor, ...], index: Tensor | None, temb: Tensor,
    mask: Tensor | None, rotary: Any, rounding: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    text_rows = _modulation(block.norm1_context, temb)
    x, text = as_rows(x), as_rows(text)
    text_eps = block.norm1_context.norm.eps
    y, text_y = block.attn(
        hidden_states=adaln_modulate(x, rows[1], rows[0], index=index, eps=block.norm1.norm.eps, rounding=rounding),
        encoder_hidden_states=adaln_modulate(text, text_rows[1], text_rows[0], eps=text_eps, rounding=rounding),
        attention_mask=mask,
        image_rotary_emb=rotary,
    )
    return (
        _second_half(x, y, rows, index, block.norm2, block.ff, rounding),
        _second_half(text, text_y, text_rows, None, block.norm2_context, block.ff_context, rounding),
    )


def _run_single(
    block: Any, x: Tensor, text: Tensor, rows: tuple[Tensor, ...], first_tokens: int | None, mask: Tensor | None,
    rotary: Any, rounding: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    video, (shift, scale, gate) = x.shape[1], rows
    x = as_rows(join(x, text))
    index = _index(x, first_tokens)
    h = adaln_modulate(x, scale, shift, index=index, eps=block.norm.norm.eps, rounding=rounding)
    mlp = block.act_mlp(block.proj_mlp(h))
    y, text_y = block.attn(
        hidden_states=h[:, :video],
        encoder_hidden_states=h[:, video:],
        attention_mask=mask,
        image_rotary_emb=rotary,
    )
    y = block.proj_out(torch.cat((join(y, text_y), mlp), dim=2))
    x = gate_residual(x, y, gate, index=index, rounding=rounding)
    return x[:, :video], x[:, video:]


def _dual_rounding(block: Any, x: Tensor) -> Any:
    first, second = (block.norm1, block.norm1_context), (block.norm2, block.norm2_context)
    return fused_rounding(block, x, (*first, *(norm.norm for norm in first), *second))


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
        streams, rounding = (hidden_states, encoder_hidden_states), _dual_rounding(self, hidden_states)
        if rounding is None:
            return stock_forward(self)(*streams, temb, attention_mask, freqs_cis, *args, **kwargs)
        rows = _modulation(self.norm1, temb)
        return _run_dual(self, *streams, rows, None, temb, attention_mask, freqs_cis, rounding)

    return forward


def _dual_with_first_frame() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        token_replace_emb: Any = None,
        num_tokens: Any = None,
    ) -> tuple[Tensor, Tensor]:
        streams, rounding = (hidden_states, encoder_hidden_states), _dual_rounding(self, hidden_states)
        if rounding is None:
            return stock_forward(self)(*streams, temb, attention_mask, freqs_cis, token_replace_emb, num_tokens)
        rows, index = _modulation(self.norm1, temb, token_replace_emb), _index(hidden_states, num_tokens)
        return _run_dual(self, *streams, rows, index, temb, attention_mask, freqs_cis, rounding)

    return forward


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
        streams = (hidden_states, encoder_hidden_states)
        rounding = fused_rounding(self, hidden_states, (self.norm, self.norm.norm))
        if rounding is None:
            return stock_forward(self)(*streams, temb, attention_mask, image_rotary_emb, *args, **kwargs)
        rows = _modulation(self.norm, temb)
        return _run_single(self, *streams, rows, None, attention_mask, image_rotary_emb, rounding)

    return forward


def _single_with_first_frame() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        token_replace_emb: Any = None,
        num_tokens: Any = None,
    ) -> tuple[Tensor, Tensor]:
        streams = (hidden_states, encoder_hidden_states)
        rounding = fused_rounding(self, hidden_states, (self.norm, self.norm.norm))
        if rounding is None:
            return stock_forward(self)(*streams, temb, attention_mask, image_rotary_emb, token_replace_emb, num_tokens)
        rows = _modulation(self.norm, temb, token_replace_emb)
        return _run_single(self, *streams, rows, num_tokens, attention_mask, image_rotary_emb, rounding)

    return forward


HUNYUAN_BLOCKS: dict[str, BlockForward] = {
    "HunyuanVideoTransformerBlock": _dual(),
    "HunyuanVideoSingleTransformerBlock": _single(),
    "HunyuanVideoTokenReplaceTransformerBlock": _dual_with_first_frame(),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _single_with_first_frame(),
    "HunyuanVideo15TransformerBlock": _dual(),
}
