"""The blocks of Wan and its relatives through fused operators: five passes over the rows instead of some forty.

Wan keeps the residual stream in the model's dtype and everything between in fp32, so ``eager`` rounding differs from
``fast`` in one place only: the second norm of a pass sees the rounded residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast.models.block_modules import BlockModules, Forecast, OneStream
from vdit_fast.models.fusion import BlockForward, as_rows, distinct_rows, fused_rounding, stock_forward
from vdit_fast.models.memory import MemoryLayout
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm

__all__ = ["WAN_BLOCKS", "WAN_MODULES"]


def _tables(block: Any, rows: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """(shift, scale, gate) of attention and feed-forward, each as (the block's own row, rows of the timestep)."""
    return [(base, row) for base, row in zip(block.scale_shift_table[0].float().unbind(0), rows, strict=True)]


def _block(
    block: Any, x: Tensor, text: Tensor, mask: Tensor | None, rotary: Any, temb: Tensor, rows_dim: int, rounding: Any
) -> Tensor:
    """One block; the six rows of ``temb`` lie along ``rows_dim``."""
    x = as_rows(x)
    temb, index = distinct_rows(block, temb, rows_dim)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _tables(block, temb.unbind(rows_dim))
    h = adaln_modulate(x, scale, shift, index=index, eps=block.norm1.eps, rounding=rounding)
    y = block.attn1(h, None, mask, rotary_emb=rotary)  # by name: diffusers 0.35 has no fourth parameter in SkyReels-V2
    if not isinstance(block.norm2, nn.Identity):
        norm = {"eps": block.norm2.eps, "weight": block.norm2.weight, "bias": block.norm2.bias}
        x, h = gate_residual_norm(x, y, gate, index=index, **norm, rounding=rounding)
    else:  # no norm before cross-attention
        x = h = gate_residual(x, y, gate, index=index, rounding=rounding)
    y = block.attn2(h, text, None)
    x, h = gate_residual_norm(x, y, None, mlp_scale, mlp_shift, index=index, eps=block.norm3.eps, rounding=rounding)
    return gate_residual(x, block.ffn(h), mlp_gate, index=index, rounding=rounding)


def _rounding(block: Any, x: Tensor) -> Any:
    norms = [norm for norm in (block.norm1, block.norm2, block.norm3) if not isinstance(norm, nn.Identity)]
    return fused_rounding(block, x, norms, ("FP32LayerNorm",), block.scale_shift_table)


def _wan() -> BlockForward:
    def forward(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        rounding = _rounding(self, hidden_states)
        if rounding is None:
            return stock_forward(self)(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return _block(self, hidden_states, encoder_hidden_states, None, rotary_emb, temb, -2, rounding)

    return forward


def _skyreels() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Tensor,
    ) -> Tensor:
        rounding = _rounding(self, hidden_states)
        if rounding is None:
            return stock_forward(self)(hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask)
        return _block(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, temb, 1, rounding)

    return forward


def _vace() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
    ) -> Any:
        rounding = _rounding(self, hidden_states)
        if rounding is None:
            return stock_forward(self)(hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb)
        control = control_hidden_states
        if self.proj_in is not None:
            control = self.proj_in(control) + hidden_states
        control = _block(self, control, encoder_hidden_states, None, rotary_emb, temb, -2, rounding)
        return None if self.proj_out is None else self.proj_out(control), control

    return forward


WAN_BLOCKS: dict[str, BlockForward] = {
    "WanTransformerBlock": _wan(),
    "SkyReelsV2TransformerBlock": _skyreels(),
    "WanVACETransformerBlock": _vace(),
}


def _row(pair: tuple[Tensor, Tensor]) -> Tensor:
    """[B, D] or [B, N, D] as it multiplies tokens."""
    rows = pair[0] + pair[1]
    return rows.unsqueeze(1) if rows.ndim == 2 else rows


class _Modules(OneStream):
    """Self-attention and feed-forward under gates, cross-attention without one."""

    hooked = ("attn1", "attn2", "ffn")

    def __init__(self, rows_dim: int) -> None:
        self._rows_dim = rows_dim  # along which the six rows of the timestep lie
        self.memory = MemoryLayout("attn1", across=True, tokens_dim={4: 1 if rows_dim == -2 else 2})

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        shift, scale = _tables(block, arguments["temb"].unbind(self._rows_dim))[:2]
        x = block.norm1(arguments["hidden_states"].float())
        return torch.addcmul(_row(shift), x, 1 + _row(scale))

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> Tensor:
        temb, index = forecast.distinct(arguments["temb"], self._rows_dim)
        _, _, gate, _, _, mlp_gate = _tables(block, temb.unbind(self._rows_dim))
        return forecast.add(arguments["hidden_states"], {"attn1": gate, "attn2": None, "ffn": mlp_gate}, index)


WAN_MODULES: dict[str, BlockModules] = {
    "WanTransformerBlock": _Modules(-2),
    "SkyReelsV2TransformerBlock": _Modules(1),
}
