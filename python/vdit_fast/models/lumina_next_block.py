"""The blocks of Lumina-Next through fused operators: norms before and after each branch, tanh gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, Outputs
from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["LUMINA_NEXT_BLOCKS", "LUMINA_NEXT_MODULES"]


def _modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """scale, gate, and scale, gate of the feed-forward: [B, D]."""
    rows: Tensor = norm.linear(norm.silu(temb))
    return rows.chunk(4, dim=1)


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        temb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        norms = (self.norm1, self.norm2, self.ffn_norm1, self.ffn_norm2)
        rounding = fused_rounding(self, hidden_states, norms, ("LuminaRMSNormZero", "RMSNorm"), self.gate)
        if rounding is None:
            return stock_forward(self)(
                hidden_states, attention_mask, image_rotary_emb, encoder_hidden_states, encoder_mask, temb,
                cross_attention_kwargs,
            )  # fmt: skip
        x, told = as_rows(hidden_states), cross_attention_kwargs or {}
        scale, gate, mlp_scale, mlp_gate = _modulation(self.norm1, temb)
        before, after, mlp_before, mlp_after = self.norm1.norm, self.norm2, self.ffn_norm1, self.ffn_norm2
        h = adaln_modulate(x, scale, norm="rms", eps=before.eps, weight=before.weight, rounding=rounding)
        y = self.attn1(
            hidden_states=h,
            encoder_hidden_states=h,
            attention_mask=attention_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=image_rotary_emb,
            **told,
        )
        text_y = self.attn2(
            hidden_states=h,
            encoder_hidden_states=self.norm1_context(encoder_hidden_states),
            attention_mask=encoder_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=None,
            **told,
        )
        heads = self.gate.tanh().repeat_interleave(y.shape[-1])  # the text's gate is one number per head
        y = gate_residual(y.flatten(2), text_y.flatten(2), heads, rounding=rounding)
        x, h = gate_residual_norm(
            x,
            self.attn2.to_out[0](y),
            gate,
            mlp_scale,
            gate_activation="tanh",
            post_norm="rms",
            post_eps=after.eps,
            post_weight=after.weight,
            norm="rms",
            eps=mlp_before.eps,
            weight=mlp_before.weight,
            rounding=rounding,
        )
        post = {"post_norm": "rms", "post_eps": mlp_after.eps, "post_weight": mlp_after.weight}
        return gate_residual(x, self.feed_forward(h), mlp_gate, gate_activation="tanh", **post, rounding=rounding)

    return forward


LUMINA_NEXT_BLOCKS: dict[str, BlockForward] = {"LuminaNextDiTBlock": _block()}


class _Modules:
    """Attention and feed-forward, whose normed results are kept: tanh gates multiply them."""

    memory = "text is read beside the video under a gate of its own, and nobody says where memory belongs"
    hooked = ("attn2.to_out.0", "feed_forward")

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("norm2", "ffn_norm2"), (0,))

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        attention, mlp = (outputs[name][0] for name in self.hooked)
        return {"norm2": block.norm2(attention), "ffn_norm2": block.ffn_norm2(mlp)}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        normed: Tensor = block.norm1(arguments["hidden_states"], arguments["temb"])[0]
        return normed

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        _, gate, _, mlp_gate = (torch.tanh(row) for row in _modulation(block.norm1, arguments["temb"]))
        return forecast.add(arguments["hidden_states"], {"norm2": gate, "ffn_norm2": mlp_gate})


LUMINA_NEXT_MODULES: dict[str, BlockModules] = {"LuminaNextDiTBlock": _Modules()}
