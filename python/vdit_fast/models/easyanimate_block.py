"""The blocks of EasyAnimate through fused operators: two streams with one norm, and a norm after the feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, Outputs
from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.memory import MemoryLayout
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["EASYANIMATE_BLOCKS", "EASYANIMATE_MODULES"]


def _modulation(norm: Any, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(shift, scale, gate) of the video and of the text, [B, D] each."""
    rows: Tensor = norm.linear(norm.silu(temb))
    six = rows.chunk(6, dim=1)
    return six[:3], six[3:]


def _affine(norm: Any) -> dict[str, Any]:
    return {"eps": norm.norm.eps, "weight": norm.norm.weight, "bias": norm.norm.bias}


def _second_half(
    block: Any, x: Tensor, y: Tensor, gate: Tensor, rows: tuple[Tensor, ...], mlp: Any, rounding: Any
) -> Tensor:
    shift, scale, mlp_gate = rows
    x, h = gate_residual_norm(x, y, gate, scale, shift, **_affine(block.norm2), rounding=rounding)
    post: dict[str, Any] = {}
    if block.norm3 is not None:
        norm = block.norm3
        post = {"post_norm": "layer", "post_eps": norm.eps, "post_weight": norm.weight, "post_bias": norm.bias}
    return gate_residual(x, mlp(h), mlp_gate, **post, rounding=rounding)


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        norms = [norm for norm in (self.norm1, self.norm2, self.norm3) if norm is not None]
        classes = ("EasyAnimateLayerNormZero", "FP32LayerNorm", "LayerNorm")
        rounding = fused_rounding(self, hidden_states, norms, classes)
        if rounding is None:
            return stock_forward(self)(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        x, text = as_rows(hidden_states), as_rows(encoder_hidden_states)
        (shift, scale, gate), (text_shift, text_scale, text_gate) = _modulation(self.norm1, temb)
        rows, text_rows = _modulation(self.norm2, temb)
        affine = _affine(self.norm1)
        y, text_y = self.attn1(
            hidden_states=adaln_modulate(x, scale, shift, **affine, rounding=rounding),
            encoder_hidden_states=adaln_modulate(text, text_scale, text_shift, **affine, rounding=rounding),
            image_rotary_emb=image_rotary_emb,
        )
        text_mlp = self.ff if self.txt_ff is None else self.txt_ff
        return (
            _second_half(self, x, y, gate, rows, self.ff, rounding),
            _second_half(self, text, text_y, text_gate, text_rows, text_mlp, rounding),
        )

    return forward


EASYANIMATE_BLOCKS: dict[str, BlockForward] = {"EasyAnimateTransformerBlock": _block()}


class _Modules:
    """Joint attention and feed-forward under gates; where a norm follows the feed-forward, its result is kept."""

    memory = MemoryLayout("attn1")
    hooked = ("attn1", "ff", "txt_ff")

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return {"attn1": (0,), "ff": (0,), "attn1_text": (1,), "ff_text": (1,)}

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        video, text = outputs["attn1"][0]
        mlp, text_mlp = outputs["ff"][0], outputs["ff"][1] if block.txt_ff is None else outputs["txt_ff"][0]
        if block.norm3 is not None:
            mlp, text_mlp = block.norm3(mlp), block.norm3(text_mlp)
        return {"attn1": video, "ff": mlp, "attn1_text": text, "ff_text": text_mlp}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        streams = arguments["hidden_states"], arguments["encoder_hidden_states"]
        normed: Tensor = block.norm1(*streams, arguments["temb"])[0]
        return normed

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> tuple[Tensor, Tensor]:
        first, text_first = _modulation(block.norm1, arguments["temb"])
        second, text_second = _modulation(block.norm2, arguments["temb"])
        return (
            forecast.add(arguments["hidden_states"], {"attn1": first[2], "ff": second[2]}),
            forecast.add(arguments["encoder_hidden_states"], {"attn1_text": text_first[2], "ff_text": text_second[2]}),
        )


EASYANIMATE_MODULES: dict[str, BlockModules] = {"EasyAnimateTransformerBlock": _Modules()}
