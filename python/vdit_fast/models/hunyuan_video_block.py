"""The blocks of HunyuanVideo, of its token-replacing variant and of HunyuanVideo-1.5 through fused operators.

Token replacement (I2V) keeps the first frame at timestep 0: the modulation is then a table of two rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, Outputs
from vdit_fast.models.fusion import BlockForward, as_rows, fused_rounding, stock_forward
from vdit_fast.models.joint import join
from vdit_fast.models.memory import MemoryLayout
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm
from vdit_fast.reference.adaln import Rounding

__all__ = ["HUNYUAN_BLOCKS", "HUNYUAN_MODULES"]


_DUAL = ("AdaLayerNormZero", "HunyuanVideoTokenReplaceAdaLayerNormZero", "LayerNorm")
_SINGLE = ("AdaLayerNormZeroSingle", "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle", "LayerNorm")


def _modulation(norm: Any, temb: Tensor, replaced: Tensor | None = None) -> tuple[Tensor, ...]:
    """The rows an adaptive norm makes of the timestep: shift, scale, gate, and a dual block's second three. [B, D], or
    [B, 2, D] with ``replaced``, the embedding of the first frame, whose row comes first."""
    rows: Tensor = norm.linear(norm.silu(temb))
    if replaced is not None:
        rows = torch.stack((norm.linear(norm.silu(replaced)), rows), dim=1)
    return rows.chunk(rows.shape[-1] // norm.norm.normalized_shape[0], dim=-1)


def _index(x: Tensor, first: int | None) -> Tensor | None:
    """Row of every token of x [B, N, D] in such a table: 0 for the ``first`` tokens, 1 for all others."""
    return None if first is None else (torch.arange(x.shape[1], device=x.device) >= first).to(torch.int32)


def _run_dual(
    block: Any, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None, rotary: Any, rounding: Rounding,
    replaced: Tensor | None = None, first: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, text_rows = _modulation(block.norm1, temb, replaced), _modulation(block.norm1_context, temb)
    x, text, index = as_rows(x), as_rows(text), _index(x, first)
    h = adaln_modulate(x, rows[1], rows[0], index=index, eps=block.norm1.norm.eps, rounding=rounding)
    text_h = adaln_modulate(text, text_rows[1], text_rows[0], eps=block.norm1_context.norm.eps, rounding=rounding)
    y, text_y = block.attn(hidden_states=h, encoder_hidden_states=text_h, attention_mask=mask, image_rotary_emb=rotary)
    return (
        _second_half(x, y, rows, index, block.norm2, block.ff, rounding),
        _second_half(text, text_y, text_rows, None, block.norm2_context, block.ff_context, rounding),
    )


def _second_half(
    x: Tensor, y: Tensor, rows: tuple[Tensor, ...], index: Tensor | None, norm: Any, mlp: Any, rounding: Rounding
) -> Tensor:
    _, _, gate, shift, scale, mlp_gate = rows
    x, h = gate_residual_norm(x, y, gate, scale, shift, index=index, eps=norm.eps, rounding=rounding)
    return gate_residual(x, mlp(h), mlp_gate, index=index, rounding=rounding)


def _run_single(
    block: Any, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None, rotary: Any, rounding: Rounding,
    replaced: Tensor | None = None, first: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    video = x.shape[1]
    shift, scale, gate = _modulation(block.norm, temb, replaced)
    x = as_rows(join(x, text))
    index = _index(x, first)
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


def _dual_norms(block: Any) -> tuple[Any, ...]:
    return block.norm1, block.norm1_context, block.norm2, block.norm2_context


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
        call = hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis
        rounding = fused_rounding(self, hidden_states, _dual_norms(self), _DUAL)
        return stock_forward(self)(*call, *args, **kwargs) if rounding is None else _run_dual(self, *call, rounding)

    return forward


def _replacing_dual() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis
        rounding = fused_rounding(self, hidden_states, _dual_norms(self), _DUAL)
        if rounding is None:
            return stock_forward(self)(*call, token_replace_emb, num_tokens)
        return _run_dual(self, *call, rounding, token_replace_emb, num_tokens)

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
        call = hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb
        rounding = fused_rounding(self, hidden_states, (self.norm,), _SINGLE)
        return stock_forward(self)(*call, *args, **kwargs) if rounding is None else _run_single(self, *call, rounding)

    return forward


def _replacing_single() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb
        rounding = fused_rounding(self, hidden_states, (self.norm,), _SINGLE)
        if rounding is None:
            return stock_forward(self)(*call, token_replace_emb, num_tokens)
        return _run_single(self, *call, rounding, token_replace_emb, num_tokens)

    return forward


HUNYUAN_BLOCKS: dict[str, BlockForward] = {
    "HunyuanVideoTransformerBlock": _dual(),
    "HunyuanVideoSingleTransformerBlock": _single(),
    "HunyuanVideoTokenReplaceTransformerBlock": _replacing_dual(),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _replacing_single(),
    "HunyuanVideo15TransformerBlock": _dual(),
}


def _modulated(norm: Any, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    replaced = arguments.get("token_replace_emb")
    shift, scale = _modulation(norm, arguments["temb"], replaced)[:2]
    index = _index(x, arguments["num_tokens"]) if replaced is not None else None
    shift, scale = (row[:, None] if index is None else row[:, index] for row in (shift, scale))
    return torch.addcmul(shift, norm.norm(x), 1 + scale)


class _DualModules:
    """Joint attention and two feed-forwards, all under gates."""

    memory = MemoryLayout("attn", timestep_only=False, exchanged={"token_replace_emb": None})
    hooked = ("attn", "ff", "ff_context")

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return {"attn": (0,), "ff": (0,), "attn_context": (1,), "ff_context": (1,)}

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        video, text = outputs["attn"][0][:2]
        return {
            "attn": video, "ff": outputs["ff"][0], "attn_context": text, "ff_context": outputs["ff_context"][0],
        }  # fmt: skip

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        return _modulated(block.norm1, arguments["hidden_states"], arguments)

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> tuple[Tensor, Tensor]:
        x, text, temb = arguments["hidden_states"], arguments["encoder_hidden_states"], arguments["temb"]
        replaced = arguments.get("token_replace_emb")
        rows, text_rows = _modulation(block.norm1, temb, replaced), _modulation(block.norm1_context, temb)
        index = _index(x, arguments["num_tokens"]) if replaced is not None else None
        return (
            forecast.add(x, {"attn": rows[2], "ff": rows[5]}, index),
            forecast.add(text, {"attn_context": text_rows[2], "ff_context": text_rows[5]}),
        )


class _SingleModules:
    """Attention and feed-forward side by side, under one projection and one gate, over both streams at once."""

    memory = MemoryLayout("attn", timestep_only=False, exchanged={"token_replace_emb": None})
    hooked = ("proj_out",)

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return {"proj_out": (0, 1)}

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        return {"proj_out": outputs["proj_out"][0]}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        return _modulated(block.norm, arguments["hidden_states"], arguments)

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> tuple[Tensor, Tensor]:
        x, text, replaced = (arguments.get(n) for n in ("hidden_states", "encoder_hidden_states", "token_replace_emb"))
        assert x is not None and text is not None
        _, _, gate = _modulation(block.norm, arguments["temb"], replaced)
        both = join(x, text)
        index = _index(both, arguments["num_tokens"]) if replaced is not None else None
        both = forecast.add(both, {"proj_out": gate}, index)
        return both[:, : x.shape[1]], both[:, x.shape[1] :]


HUNYUAN_MODULES: dict[str, BlockModules] = {
    "HunyuanVideoTransformerBlock": _DualModules(),
    "HunyuanVideoSingleTransformerBlock": _SingleModules(),
    "HunyuanVideoTokenReplaceTransformerBlock": _DualModules(),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _SingleModules(),
    "HunyuanVideo15TransformerBlock": _DualModules(),
}
