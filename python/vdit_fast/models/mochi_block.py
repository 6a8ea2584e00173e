"""The blocks of Mochi through fused operators: modulated RMSNorms, residuals of normed branches under tanh gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, Outputs
from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.memory import MemoryLayout
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["MOCHI_BLOCKS", "MOCHI_MODULES"]


def _modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """scale, gate, and scale, gate of the feed-forward: [B, D]."""
    rows: Tensor = norm.linear(norm.silu(temb))
    return rows.chunk(4, dim=1)


def _modulated(x: Tensor, norm: Any, scale: Tensor, rounding: Any) -> Tensor:
    # Mochi scales in fp32, whatever the dtype of the scale
    return adaln_modulate(x, scale.float(), norm="rms", eps=norm.norm.eps, rounding=rounding)


def _residual(x: Tensor, y: Tensor, gate: Tensor, norm: Any, rounding: Any) -> Tensor:
    post = {"post_norm": "rms", "post_eps": norm.norm.eps}
    return gate_residual(x, y, gate, gate_activation="tanh", **post, rounding=rounding)


def _second_half(
    x: Tensor, y: Tensor, rows: tuple[Tensor, ...], norms: tuple[Any, Any, Any], mlp: Any, rounding: Any
) -> Tensor:
    """From the attention's result to the end of a stream; norms: after attention, before and after the feed-forward."""
    _, gate, scale, mlp_gate = rows
    after, before, last = norms
    if rounding == "eager":  # the gate is rounded and the scale is not, which one pass cannot do
        x = _residual(x, y, gate, after, rounding)
        h = _modulated(x, before, scale, rounding)
    else:
        x, h = gate_residual_norm(
            x,
            y,
            torch.tanh(gate).float(),
            scale.float(),
            post_norm="rms",
            post_eps=after.norm.eps,
            norm="rms",
            eps=before.norm.eps,
            rounding=rounding,
        )
    return _residual(x, mlp(h), mlp_gate, last, rounding)


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        encoder_attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        norms = [self.norm1, self.norm2, self.norm3, self.norm4]
        if not self.context_pre_only:
            norms += [self.norm1_context, self.norm2_context, self.norm3_context, self.norm4_context]
        classes = ("MochiRMSNormZero", "MochiModulatedRMSNorm", "RMSNorm")
        rounding = fused_rounding(self, hidden_states, norms, classes)
        if rounding is None:
            streams = (hidden_states, encoder_hidden_states)
            return stock_forward(self)(*streams, temb, encoder_attention_mask, image_rotary_emb)
        x, text = as_rows(hidden_states), as_rows(encoder_hidden_states)
        rows, text_rows = _modulation(self.norm1, temb), None
        h = _modulated(x, self.norm1, rows[0], rounding)
        if self.context_pre_only:
            text_h = self.norm1_context(text, temb)
        else:
            text_rows = _modulation(self.norm1_context, temb)
            text_h = _modulated(text, self.norm1_context, text_rows[0], rounding)
        y, text_y = self.attn1(
            hidden_states=h,
            encoder_hidden_states=text_h,
            image_rotary_emb=image_rotary_emb,
            attention_mask=encoder_attention_mask,
        )
        x = _second_half(x, y, rows, (self.norm2, self.norm3, self.norm4), self.ff, rounding)
        if text_rows is not None:
            text_norms = (self.norm2_context, self.norm3_context, self.norm4_context)
            text = _second_half(text, text_y, text_rows, text_norms, self.ff_context, rounding)
        return x, text

    return forward


MOCHI_BLOCKS: dict[str, BlockForward] = {"MochiTransformerBlock": _block()}


class _Modules:
    """Joint attention and feed-forward, whose normed results are kept: tanh gates multiply them. The last block leaves
    the text as it is."""

    memory = MemoryLayout("attn1", timestep_only=False)
    hooked = ("attn1", "ff", "ff_context")

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        text = {} if block.context_pre_only else {"attn1_context": (1,), "ff_context": (1,)}
        return {"attn1": (0,), "ff": (0,), **text}

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        video, text = outputs["attn1"][0]
        found = {"attn1": block.norm2(video), "ff": block.norm4(outputs["ff"][0])}
        if not block.context_pre_only:
            found["attn1_context"] = block.norm2_context(text)
            found["ff_context"] = block.norm4_context(outputs["ff_context"][0])
        return found

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        normed: Tensor = block.norm1(arguments["hidden_states"], arguments["temb"])[0]
        return normed

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> tuple[Tensor, Tensor]:
        x, text, temb = arguments["hidden_states"], arguments["encoder_hidden_states"], arguments["temb"]
        _, gate, _, mlp_gate = (torch.tanh(row) for row in _modulation(block.norm1, temb))
        x = forecast.add(x, {"attn1": gate, "ff": mlp_gate})
        if not block.context_pre_only:
            _, gate, _, mlp_gate = (torch.tanh(row) for row in _modulation(block.norm1_context, temb))
            text = forecast.add(text, {"attn1_context": gate, "ff_context": mlp_gate})
        return x, text


MOCHI_MODULES: dict[str, BlockModules] = {"MochiTransformerBlock": _Modules()}
