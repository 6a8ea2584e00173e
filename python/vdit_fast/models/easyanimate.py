"""EasyAnimate: one joint stream, text tokens before the video tokens, no mask.

The first blocks have projections of their own for the text, further ones (``mmdit_layers``) share the video's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, patch_grid, project_heads, rotate_pairs
from vdit_fast.models.registry import register
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["EasyAnimateAdapter", "EasyAnimateProcessor"]


class EasyAnimateProcessor(ServedProcessor):
    """Joint attention over [text, video]: LayerNorm per head, RoPE on the video tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.stands_aside(attention_mask):
            stock: tuple[Tensor, Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        text = encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:
            query, key, value = project_heads(attn, torch.cat((encoder_hidden_states, hidden_states), dim=1))
            text_query, text_key, text_value = query[:, :text], key[:, :text], value[:, :text]
            query, key, value = query[:, text:], key[:, text:], value[:, text:]
        else:
            query, key, value = project_heads(attn, hidden_states)
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            if attn.norm_added_q is not None:
                text_query = attn.norm_added_q(text_query)
            if attn.norm_added_k is not None:
                text_key = attn.norm_added_k(text_key)
        anchor = None
        if image_rotary_emb is not None:
            anchor = image_rotary_emb[0]
            cos, sin = (table.to(query.device) for table in image_rotary_emb)  # made on the CPU
            query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        query = torch.cat((text_query, query), dim=1)
        key = torch.cat((text_key, key), dim=1)
        value = torch.cat((text_value, value), dim=1)

        out = served_attention(query, key, value, self.handle, anchor=anchor).flatten(2, 3).to(query.dtype)
        text_out, out = out[:, :text], out[:, text:]
        if getattr(attn, "to_out", None) is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return out, text_out


class EasyAnimateAdapter(ModelAdapter):
    family = "easyanimate"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"EasyAnimateAttnProcessor2_0": EasyAnimateProcessor}

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if getattr(module, "is_cross_attention", False):
            return "cross-attention"
        return super().skip_reason(name, module, processor)

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        texts = [arguments.get("encoder_hidden_states"), arguments.get("encoder_hidden_states_t5")]
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not isinstance(texts[0], Tensor):
            return None
        if not isinstance(patch, int):
            return None
        _, _, frames, height, width = latents.shape
        text = sum(part.shape[1] for part in texts if isinstance(part, Tensor))
        return Geometry(patch_grid((frames, height, width), (1, patch, patch)), text=text, text_first=True)


register(EasyAnimateAdapter())
