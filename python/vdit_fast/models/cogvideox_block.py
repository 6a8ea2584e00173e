"""The blocks of CogVideoX and ConsisID through fused operators.

Text and video have rows of their own in the modulation, but one norm and one feed-forward: both streams run as one
buffer [text, video] with a table of two rows, so that nothing is concatenated.
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

__all__ = ["COGVIDEOX_BLOCKS", "COGVIDEOX_MODULES"]


def _tables(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """shift, scale, gate: [B, 2, D], the text's row and the video's."""
    rows: Tensor = norm.linear(norm.silu(temb))
    return rows.unflatten(1, (2, 3, -1)).flip(1).unbind(2)


def _affine(norm: Any) -> dict[str, Any]:
    return {"eps": norm.norm.eps, "weight": norm.norm.weight, "bias": norm.norm.bias}


def _run(
    block: Any, x: Tensor, text: Tensor, temb: Tensor, rotary: Any, attention_kwargs: dict[str, Any], rounding: Rounding
) -> tuple[Tensor, Tensor]:
    length = text.shape[1]
    x = as_rows(join(text, x))
    index = (torch.arange(x.shape[1], device=x.device) >= length).to(torch.int32)
    shift, scale, gate = _tables(block.norm1, temb)
    mlp_shift, mlp_scale, mlp_gate = _tables(block.norm2, temb)
    h = adaln_modulate(x, scale, shift, index=index, **_affine(block.norm1), rounding=rounding)
    y, text_y = block.attn1(
        hidden_states=h[:, length:],
        encoder_hidden_states=h[:, :length],
        image_rotary_emb=rotary,
        **attention_kwargs,
    )
    modulation = {"index": index, **_affine(block.norm2), "rounding": rounding}
    x, h = gate_residual_norm(x, join(text_y, y), gate, mlp_scale, mlp_shift, **modulation)
    x = gate_residual(x, block.ff(h), mlp_gate, index=index, rounding=rounding)
    return x[:, length:], x[:, :length]


def _rounding(block: Any, x: Tensor) -> Rounding | None:
    return fused_rounding(block, x, (block.norm1, block.norm2), ("CogVideoXLayerNormZero", "LayerNorm"))


def _cogvideox() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = hidden_states, encoder_hidden_states, temb, image_rotary_emb
        rounding = _rounding(self, hidden_states)
        if rounding is None:
            return stock_forward(self)(*call, attention_kwargs)
        return _run(self, *call, attention_kwargs or {}, rounding)

    return forward


def _consisid() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        call = hidden_states, encoder_hidden_states, temb, image_rotary_emb
        rounding = _rounding(self, hidden_states)
        return stock_forward(self)(*call) if rounding is None else _run(self, *call, {}, rounding)

    return forward


COGVIDEOX_BLOCKS: dict[str, BlockForward] = {"CogVideoXBlock": _cogvideox(), "ConsisIDBlock": _consisid()}


class _Modules:
    """Attention and feed-forward over [text, video], with gates of their own for text and video."""

    memory = MemoryLayout("attn1")
    hooked = ("attn1", "ff")

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.hooked, (1, 0))

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        y, text_y = outputs["attn1"][0]
        return {"attn1": join(text_y, y), "ff": outputs["ff"][0]}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        streams = arguments["hidden_states"], arguments["encoder_hidden_states"]
        normed: Tensor = block.norm1(*streams, arguments["temb"])[0]
        return normed

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> tuple[Tensor, Tensor]:
        x, text, temb = arguments["hidden_states"], arguments["encoder_hidden_states"], arguments["temb"]
        both, length = join(text, x), text.shape[1]
        index = (torch.arange(both.shape[1], device=x.device) >= length).to(torch.int32)
        gate, mlp_gate = _tables(block.norm1, temb)[2], _tables(block.norm2, temb)[2]
        both = forecast.add(both, {"attn1": gate, "ff": mlp_gate}, index)
        return both[:, length:], both[:, :length]


COGVIDEOX_MODULES: dict[str, BlockModules] = {"CogVideoXBlock": _Modules(), "ConsisIDBlock": _Modules()}
