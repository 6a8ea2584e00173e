"""Cosmos 1, 2 and 2.5: self-attention over the video tokens, text (2.5: and image) context by cross-attention.

Self- and cross-attention share the processor class and the module class; the module tells which is which.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, patch_grid, split_heads
from vdit_fast.models.cosmos_block import COSMOS_BLOCKS, COSMOS_MODULES
from vdit_fast.models.qk import Rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["CosmosAdapter", "CosmosProcessor"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of x [B, N, H, D] with channel i + D/2 by tables [N, D]: products in fp32, then x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(x.dtype)


def _rotary(cos: Tensor, sin: Tensor) -> Rotary:
    return Rotary(cos, sin, lambda x: _rotate(x, cos, sin), layout="half")


class CosmosProcessor(ServedProcessor):
    """RMSNorm per head, then rotate-half RoPE. Queries and keys have as many heads, so nothing is repeated."""

    takes_positions = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        anchor = image_rotary_emb[0] if image_rotary_emb is not None else None
        if encoder_hidden_states is None:
            image_rotary_emb = self.tables(image_rotary_emb, hidden_states)
        if encoder_hidden_states is not None or self.stands_aside(attention_mask):
            stock: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return stock
        rotary = None
        if image_rotary_emb is not None:
            rotary = _rotary(*(table.to(hidden_states.device) for table in image_rotary_emb))
        heads, norms = split_heads(attn, hidden_states), (attn.norm_q, attn.norm_k)
        query, key, value = turned_heads(self, heads, norms, rotary)
        out = served_attention(query, key, value, self.handle, anchor=anchor)
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


class CosmosAdapter(ModelAdapter):
    family = "cosmos"
    calls_per_branch = True
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "CosmosAttnProcessor2_0": CosmosProcessor,
        "CosmosAttnProcessor2_5": CosmosProcessor,  # found only where skip_reason says no
    }
    blocks = COSMOS_BLOCKS
    block_modules = COSMOS_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout(
        "last",
        arguments={
            name: along({3: 1})
            for name in ("embedded_timestep", "temb", "extra_pos_emb", "controlnet_residual", "latents")
        }
        | {"image_rotary_emb": along({2: 0})},
    )

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if hasattr(module, "q_img"):
            return "cross-attention to text and image context"
        if getattr(module, "is_cross_attention", False):
            return "cross-attention"
        if name.startswith("control_blocks."):
            return "attention of a control network, whose video grid is not known"
        return super().skip_reason(name, module, processor)

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not isinstance(patch, (tuple, list)):
            return None
        _, _, frames, height, width = latents.shape
        return Geometry(patch_grid((frames, height, width), (patch[0], patch[1], patch[2])))


register(CosmosAdapter())
