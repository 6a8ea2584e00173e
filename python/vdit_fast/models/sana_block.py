"""The blocks of Sana and Sana-Video through fused operators, and what caches keep of them.

Between attention and the residual stream lies a convolution over the tokens' grid, which works on channels first: its
result is laid out as rows again before it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, OneStream, Outputs
from vdit_fast.models.fusion import BlockForward, as_rows, distinct_rows, fused_rounding, stock_forward
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm
from vdit_fast.reference.adaln import Rounding

__all__ = ["SANA_BLOCKS", "SANA_MODULES"]

Tables = list[tuple[Tensor, Tensor]]
"""Shift, scale and gate of attention and of the feed-forward, each as (the block's own row, rows of the timestep)."""
Distinct = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


def _tables(block: Any, temb: Tensor, batch: int, distinct: Distinct) -> tuple[Tables, Tensor | None]:
    """The tables, and which of their rows every token takes, of ``temb`` [B, 6 C] or [B, 1 or N, 6 C]."""
    own, index = block.scale_shift_table.unbind(0), None
    rows = temb.reshape(batch, -1, 6, own[0].shape[0])
    if rows.shape[1] > 1:
        rows, index = distinct(rows, -2)
    return list(zip(own, rows.unbind(2), strict=True)), index


def _block(
    block: Any, x: Tensor, temb: Tensor, rounding: Rounding, attend: Callable[[Tensor], Tensor], text: dict[str, Any],
    feed: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """One block; ``attend`` and ``feed`` are its self-attention and its feed-forward, [B, N, C] to the same."""
    x = as_rows(x)
    tables, index = _tables(block, temb, x.shape[0], lambda rows, dim: distinct_rows(block, rows, dim))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = tables
    how: dict[str, Any] = {"index": index, "rounding": rounding}
    norm = {"eps": block.norm2.eps, "weight": block.norm2.weight, "bias": block.norm2.bias}
    y = attend(adaln_modulate(x, scale, shift, eps=block.norm1.eps, **how))
    if block.attn2 is None:
        x, h = gate_residual_norm(x, y, gate, mlp_scale, mlp_shift, **norm, **how)
    else:
        x = gate_residual(x, y, gate, **how)
        x, h = gate_residual_norm(x, block.attn2(x, **text), None, mlp_scale, mlp_shift, **norm, **how)
    return gate_residual(x, as_rows(feed(h)), mlp_gate, **how)


def _rounding(block: Any, x: Tensor) -> Rounding | None:
    return fused_rounding(block, x, (block.norm1, block.norm2), ("LayerNorm",), block.scale_shift_table)


def _sana() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        rounding = _rounding(self, hidden_states)
        if rounding is None or timestep is None:
            result: Tensor = stock_forward(self)(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, height, width
            )
            return result

        def feed(h: Tensor) -> Tensor:
            return _image_rows(self.ff(h.unflatten(1, (height, width)).permute(0, 3, 1, 2)))

        text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        return _block(self, hidden_states, timestep, rounding, self.attn1, text, feed)

    return forward


def _sana_video() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        rounding = _rounding(self, hidden_states)
        if rounding is None or timestep is None:
            result: Tensor = stock_forward(self)(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, frames, height,
                width, rotary_emb,
            )  # fmt: skip
            return result

        def attend(h: Tensor) -> Tensor:
            result: Tensor = self.attn1(h, rotary_emb=rotary_emb)
            return result

        def feed(h: Tensor) -> Tensor:
            return _video_rows(self.ff(h.unflatten(1, (frames, height, width))))

        text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        return _block(self, hidden_states, timestep, rounding, attend, text, feed)

    return forward


SANA_BLOCKS: dict[str, BlockForward] = {
    "SanaTransformerBlock": _sana(),
    "SanaVideoTransformerBlock": _sana_video(),
}


def _image_rows(y: Tensor) -> Tensor:
    """[B, C, H, W] to [B, N, C]."""
    return y.flatten(2, 3).permute(0, 2, 1)


def _video_rows(y: Tensor) -> Tensor:
    """[B, F, H, W, C] to [B, N, C]."""
    return y.flatten(1, 3)


class _Modules(OneStream):
    """Self-attention and feed-forward under gates, cross-attention, where there is any, without one."""

    memory = "its self-attention is linear: keys of memory rows would change every token's sums"
    hooked = ("attn1", "attn2", "ff")

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        self._rows = rows  # of what the feed-forward returns

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        found = super().features(block, outputs)
        return found | {"ff": as_rows(self._rows(found["ff"]))}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        x, temb = arguments["hidden_states"], arguments["timestep"]
        rows = block.scale_shift_table + temb.reshape(x.shape[0], -1, *block.scale_shift_table.shape)
        normed: Tensor = block.norm1(x)
        return normed * (1 + rows[:, :, 1]) + rows[:, :, 0]

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        x = arguments["hidden_states"]
        tables, index = _tables(block, arguments["timestep"], x.shape[0], forecast.distinct)
        gates = {"attn1": tables[2], "attn2": None, "ff": tables[5]}
        return forecast.add(x, {name: gates[name] for name in self.parts(block)}, index)


SANA_MODULES: dict[str, BlockModules] = {
    "SanaTransformerBlock": _Modules(_image_rows),
    "SanaVideoTransformerBlock": _Modules(_video_rows),
}
