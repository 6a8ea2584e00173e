"""The blocks of LTX-Video through fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, OneStream
from vdit_fast.models.fusion import BlockForward, as_rows, distinct_rows, fused_rounding, stock_forward
from vdit_fast.models.memory import MemoryLayout
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["LTX_BLOCKS", "LTX_MODULES"]


def _rms(norm: Any) -> dict[str, Any]:
    return {"norm": "rms", "eps": norm.eps, "weight": norm.weight}


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        norms, tables = (self.norm1, self.norm2), self.scale_shift_table
        rounding = fused_rounding(self, hidden_states, norms, ("RMSNorm",), tables)
        if rounding is None:
            return stock_forward(self)(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask
            )
        x = as_rows(hidden_states)
        rows, index = temb.reshape(temb.shape[0], temb.shape[1], 6, -1), None
        if rows.shape[1] > 1:
            rows, index = distinct_rows(self, rows, -2)
        both = list(zip(tables.unbind(0), rows.unbind(2), strict=True))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = both
        h = adaln_modulate(x, scale, shift, index=index, **_rms(self.norm1), rounding=rounding)
        y = self.attn1(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
        x = gate_residual(x, y, gate, index=index, rounding=rounding)
        y = self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )
        x, h = gate_residual_norm(x, y, None, mlp_scale, mlp_shift, index=index, **_rms(self.norm2), rounding=rounding)
        return gate_residual(x, self.ff(h), mlp_gate, index=index, rounding=rounding)

    return forward


LTX_BLOCKS: dict[str, BlockForward] = {"LTXVideoTransformerBlock": _block()}


class _Modules(OneStream):
    """Self-attention and feed-forward under gates, cross-attention without one."""

    memory = MemoryLayout("attn1", across=True, tokens_dim={3: 1})
    hooked = ("attn1", "attn2", "ff")

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        rows = arguments["temb"].unflatten(-1, (6, -1))
        shift, scale = block.scale_shift_table[0] + rows[:, :, 0], block.scale_shift_table[1] + rows[:, :, 1]
        normed: Tensor = block.norm1(arguments["hidden_states"])
        return normed * (1 + scale) + shift

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        temb, index = arguments["temb"], None
        rows = temb.reshape(temb.shape[0], temb.shape[1], 6, -1)
        if rows.shape[1] > 1:
            rows, index = forecast.distinct(rows, -2)
        both = list(zip(block.scale_shift_table.unbind(0), rows.unbind(2), strict=True))
        return forecast.add(arguments["hidden_states"], {"attn1": both[2], "attn2": None, "ff": both[5]}, index)


LTX_MODULES: dict[str, BlockModules] = {"LTXVideoTransformerBlock": _Modules()}
