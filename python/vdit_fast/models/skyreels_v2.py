"""SkyReels-V2: T2V, I2V and diffusion forcing. Wan's blocks; text and image enter by cross-attention.

Diffusion forcing gives every frame its own timestep, which attention does not see. The autoregressive variant
(``num_frame_per_block`` > 1) makes a block-causal mask of N x N, of which the configuration says what is in it: a plan
reads the allowed keys only and the mask not at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ServedProcessor
from vdit_fast.models.qk import Rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, Take, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry
from vdit_fast.models.stage_layout import StageLayout, volume_of
from vdit_fast.models.wan import WanAdapter, wan_rotary

__all__ = ["SkyReelsV2Adapter", "SkyReelsV2Processor", "skyreels_rotary"]


def skyreels_rotary(table: tuple[Tensor, Tensor] | Tensor) -> Rotary:
    """The rotation by cos and sin as in Wan, or one complex table [1, 1, N, D / 2] (diffusers 0.35)."""
    if not isinstance(table, Tensor):
        return wan_rotary(*table)
    turn = table.transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    return Rotary(turn.real.float().contiguous(), turn.imag.float().contiguous(), rotate)


def _some_positions(tables: Any, take: Take) -> Any:
    """Rotary tables of some tokens: cos and sin [1, N, 1, D], or one complex table [1, 1, N, D / 2]."""
    return take(tables, 2) if isinstance(tables, Tensor) else along({4: 1})(tables, take)


def _later_rotary(root: Any, latents: Tensor, first: int) -> Rotary:
    table = root.rope(latents)
    if isinstance(table, Tensor):
        return skyreels_rotary(table[:, :, first:])
    return skyreels_rotary((table[0][:, first:], table[1][:, first:]))


class SkyReelsV2Processor(ServedProcessor):
    """Self-attention: RMSNorm across heads before the head split, then interleaved RoPE."""

    takes_positions = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | Tensor | None = None,
    ) -> Tensor:
        anchor = rotary_emb[0] if isinstance(rotary_emb, tuple) else rotary_emb
        if encoder_hidden_states is None:
            rotary_emb = self.tables(rotary_emb, hidden_states)
        known = attention_mask is None or attention_mask.shape == (1, 1, *[hidden_states.shape[1]] * 2)
        if encoder_hidden_states is not None or self.stands_aside(None if known else attention_mask):
            stock: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return stock
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        heads = tuple(tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        rotary = skyreels_rotary(rotary_emb) if rotary_emb is not None else None
        query, key, value = turned_heads(self, heads, (attn.norm_q, attn.norm_k), rotary, across=True)
        out = served_attention(query, key, value, self.handle, anchor=anchor, mask=attention_mask)
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


class SkyReelsV2Adapter(WanAdapter):
    family = "skyreels_v2"
    calls_per_branch = True
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "SkyReelsV2AttnProcessor": SkyReelsV2Processor,
        "SkyReelsV2AttnProcessor2_0": SkyReelsV2Processor,
    }
    block_lists = ("blocks",)
    rows = RowLayout(
        "last",
        arguments={"temb": along({4: 2}), "rotary_emb": _some_positions},
        refused={"attention_mask": "a mask says which keys a token reads"},
    )
    stages = StageLayout(
        models=("SkyReelsV2Transformer3DModel",),
        patch="patch_embedding",
        embedders=("condition_embedder", "fps_embedding", "fps_projection"),
        patched=volume_of,
        later_rotary=_later_rotary,
    )
    left_alone: ClassVar[dict[str, str]] = {}

    def frame_timesteps(self, module: nn.Module, timesteps: Tensor, latents: Tensor) -> dict[str, Any]:
        """Diffusion forcing: [B, F]."""
        self._tokens_of_a_frame(module, latents)
        return {"timestep": timesteps.contiguous(), "enable_diffusion_forcing": True}

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        geometry = super().geometry(module, arguments)
        frames = getattr(getattr(module, "config", None), "num_frame_per_block", None) or 1
        return geometry if geometry is None or frames == 1 else replace(geometry, frame_block=frames)


register(SkyReelsV2Adapter())
