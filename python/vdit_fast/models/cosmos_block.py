"""The blocks of Cosmos 1, 2 and 2.5 through fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, OneStream
from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["COSMOS_BLOCKS", "COSMOS_MODULES"]


def _modulation(norm: Any, embedded: Tensor, temb: Tensor | None) -> tuple[Tensor, ...]:
    """shift, scale, gate: [B, D], or [B, N, D] with a timestep per token."""
    rows: Tensor = norm.linear_2(norm.linear_1(norm.activation(embedded)))
    if temb is not None:
        rows = rows + temb
    return rows.chunk(3, dim=-1)


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        embedded_timestep: Tensor,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        extra_pos_emb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        controlnet_residual: Tensor | None = None,
        latents: Tensor | None = None,
        block_idx: int | None = None,
    ) -> Any:
        norms = (self.norm1, self.norm2, self.norm3)
        newer = (controlnet_residual, latents, block_idx)  # diffusers 0.35 has neither them nor the projections
        projected = any(getattr(self, name, None) is not None for name in ("before_proj", "after_proj"))
        special = projected or controlnet_residual is not None
        rounding = fused_rounding(
            self,
            hidden_states,
            norms,
            ("CosmosAdaLayerNormZero", "LayerNorm"),
            reason="a control network is in use" if special else None,
        )
        if rounding is None:
            return stock_forward(self)(
                hidden_states, encoder_hidden_states, embedded_timestep, temb, image_rotary_emb, extra_pos_emb,
                attention_mask, *(() if all(item is None for item in newer) else newer),
            )  # fmt: skip
        x = as_rows(hidden_states if extra_pos_emb is None else hidden_states + extra_pos_emb)
        first, second, third = (_modulation(norm, embedded_timestep, temb) for norm in norms)
        h = adaln_modulate(x, first[1], first[0], eps=self.norm1.norm.eps, rounding=rounding)
        y = self.attn1(h, image_rotary_emb=image_rotary_emb)
        x, h = gate_residual_norm(x, y, first[2], second[1], second[0], eps=self.norm2.norm.eps, rounding=rounding)
        y = self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        x, h = gate_residual_norm(x, y, second[2], third[1], third[0], eps=self.norm3.norm.eps, rounding=rounding)
        return gate_residual(x, self.ff(h), third[2], rounding=rounding)

    return forward


COSMOS_BLOCKS: dict[str, BlockForward] = {"CosmosTransformerBlock": _block()}


class _Modules(OneStream):
    """Attention, cross-attention and feed-forward under gates."""

    memory = "blocks add positions to their rows before the norm, and memory rows have none"
    hooked = ("attn1", "attn2", "ff")

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        x, extra = arguments["hidden_states"], arguments.get("extra_pos_emb")
        x = x if extra is None else x + extra
        normed: Tensor = block.norm1(x, arguments["embedded_timestep"], arguments.get("temb"))[0]
        return normed

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        x, extra, control = (arguments.get(n) for n in ("hidden_states", "extra_pos_emb", "controlnet_residual"))
        assert x is not None
        norms = zip(self.hooked, (block.norm1, block.norm2, block.norm3), strict=True)
        embedded, temb = arguments["embedded_timestep"], arguments.get("temb")
        gates = {name: _modulation(norm, embedded, temb)[2] for name, norm in norms}
        x = forecast.add(x if extra is None else x + extra, gates)
        return x if control is None else x + control


COSMOS_MODULES: dict[str, BlockModules] = {"CosmosTransformerBlock": _Modules()}
