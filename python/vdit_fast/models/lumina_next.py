"""Lumina-Next: images as one frame; grouped heads, complex RoPE per axis, text by gated cross-attention.

Self-attention scales its scores by the image's size ("proportional attention") where the pipeline says for which
size the model was trained. Both attentions share the processor class and one output projection in the block.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import CROSS_ATTENTION, ModelAdapter, ServedProcessor, is_prefix_mask, patch_grid
from vdit_fast.models.lumina_next_block import LUMINA_NEXT_BLOCKS, LUMINA_NEXT_MODULES
from vdit_fast.models.qk import Rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["LuminaNextAdapter", "LuminaNextProcessor"]


def _rotary(table: Tensor) -> Rotary:
    """The rotation of neighbouring channels by a complex table [1, N, D / 2], in fp32."""

    def rotate(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table.unsqueeze(2)
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    return Rotary(table.real.float().contiguous(), table.imag.float().contiguous(), rotate)


class LuminaNextProcessor(ServedProcessor):
    """LayerNorm across heads, RoPE on both sides, fewer heads of keys and values than of queries."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        tokens = hidden_states.shape[1]
        known = attention_mask is not None and attention_mask.shape[1:] == (tokens,) and is_prefix_mask(attention_mask)
        reason = None
        if hidden_states.ndim != 3 or hidden_states.shape != encoder_hidden_states.shape or key_rotary_emb is None:
            reason = "not self-attention over [batch, tokens, channels] with RoPE"
        elif query_rotary_emb is not key_rotary_emb:
            reason = "queries and keys have rotary tables of their own"
        elif attention_mask is None:
            reason = "no attention mask, which the stock processor needs"
        if self.stands_aside(None if known else attention_mask, reason):
            stock: Tensor = self.stock(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                base_sequence_length,
            )
            return stock
        assert attention_mask is not None and key_rotary_emb is not None
        query = attn.to_q(hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        dim = query.shape[-1] // attn.heads
        query, key, value = (tensor.unflatten(2, (-1, dim)) for tensor in (query, key, value))
        query, key, value = turned_heads(self, (query, key, value), (None, None), _rotary(key_rotary_emb))

        scale = attn.scale
        if base_sequence_length is not None:
            scale = math.sqrt(math.log(tokens, base_sequence_length)) * scale
        kv_len = attention_mask.bool().sum(-1, dtype=torch.int32)
        out = served_attention(query, key, value, self.handle, kv_len=kv_len, anchor=key_rotary_emb, scale=scale)
        return out.to(query.dtype)


class LuminaNextAdapter(ModelAdapter):
    family = "lumina_next"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"LuminaAttnProcessor2_0": LuminaNextProcessor}
    blocks = LUMINA_NEXT_BLOCKS
    block_modules = LUMINA_NEXT_MODULES
    block_lists = ("layers",)
    rows = "a mask may hide image tokens, and which ones is not read on the host"

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if getattr(module, "is_cross_attention", False) or name.rpartition(".")[2] == "attn2":
            return CROSS_ATTENTION
        return super().skip_reason(name, module, processor)

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        if not isinstance(latents, Tensor) or latents.ndim != 4 or not isinstance(patch, int):
            return None
        _, _, height, width = latents.shape
        return Geometry(patch_grid((1, height, width), (1, patch, patch)))


register(LuminaNextAdapter())
