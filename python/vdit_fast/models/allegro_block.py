"""The blocks of Allegro through fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, OneStream
from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.memory import MemoryLayout
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["ALLEGRO_BLOCKS", "ALLEGRO_MODULES"]


def _affine(norm: Any) -> dict[str, Any]:
    return {"eps": norm.eps, "weight": norm.weight, "bias": norm.bias}


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        reason = "the block has no cross-attention" if self.attn2 is None else None
        norms, tables = (self.norm1, self.norm2), self.scale_shift_table
        rounding = fused_rounding(self, hidden_states, norms, ("LayerNorm",), tables, reason=reason)
        if rounding is None:
            return stock_forward(self)(
                hidden_states, encoder_hidden_states, temb, attention_mask, encoder_attention_mask, image_rotary_emb
            )
        assert temb is not None
        x = as_rows(hidden_states)
        rows = temb.reshape(x.shape[0], 6, -1).unbind(1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = zip(tables.unbind(0), rows, strict=True)
        h = adaln_modulate(x, scale, shift, **_affine(self.norm1), rounding=rounding)
        y = self.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        x = gate_residual(x, y, gate, rounding=rounding)
        y = self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            image_rotary_emb=None,
        )
        x, h = gate_residual_norm(x, y, None, mlp_scale, mlp_shift, **_affine(self.norm2), rounding=rounding)
        return gate_residual(x, self.ff(h), mlp_gate, rounding=rounding)

    return forward


ALLEGRO_BLOCKS: dict[str, BlockForward] = {"AllegroTransformerBlock": _block()}


class _Modules(OneStream):
    """Self-attention and feed-forward under gates, cross-attention, where there is any, without one."""

    memory = MemoryLayout("attn1")
    hooked = ("attn1", "attn2", "ff")

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        rows = block.scale_shift_table + arguments["temb"].unflatten(-1, (6, -1)).flatten(0, -3)
        normed: Tensor = block.norm1(arguments["hidden_states"])
        return normed * (1 + rows[:, None, 1]) + rows[:, None, 0]

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        x, temb = arguments["hidden_states"], arguments["temb"]
        both = list(zip(block.scale_shift_table.unbind(0), temb.reshape(x.shape[0], 6, -1).unbind(1), strict=True))
        gates = {"attn1": both[2], "attn2": None, "ff": both[5]}
        return forecast.add(x, {name: gates[name] for name in self.parts(block)})


ALLEGRO_MODULES: dict[str, BlockModules] = {"AllegroTransformerBlock": _Modules()}
