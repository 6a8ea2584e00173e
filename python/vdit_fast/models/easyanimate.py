"""EasyAnimate: one joint stream, text tokens before the video tokens, no mask.

The first blocks have projections of their own for the text, further ones (``mmdit_layers``) share the video's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, patch_grid, split_added_heads, split_heads
from vdit_fast.models.easyanimate_block import EASYANIMATE_BLOCKS, EASYANIMATE_MODULES
from vdit_fast.models.joint import join
from vdit_fast.models.qk import joint_heads, pair_rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["EasyAnimateAdapter", "EasyAnimateProcessor"]


class EasyAnimateProcessor(ServedProcessor):
    """Joint attention over [text, video]: LayerNorm per head, RoPE on the video tokens."""

    takes_positions = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        anchor = image_rotary_emb[0] if image_rotary_emb is not None else None
        image_rotary_emb = self.tables(image_rotary_emb, hidden_states)
        if self.stands_aside(attention_mask):
            stock: tuple[Tensor, Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        text = encoder_hidden_states.shape[1]
        norms = (attn.norm_q, attn.norm_k)
        if attn.add_q_proj is None:
            heads = split_heads(attn, join(encoder_hidden_states, hidden_states))
            rotary = pair_rotary(image_rotary_emb, hidden_states, start=text)
            query, key, value = turned_heads(self, heads, norms, rotary)
        else:
            heads, added = split_heads(attn, hidden_states), split_added_heads(attn, encoder_hidden_states)
            added_norms = (attn.norm_added_q, attn.norm_added_k)
            rotary = pair_rotary(image_rotary_emb, hidden_states)  # its tables are made on the CPU
            query, key, value = joint_heads(self, heads, norms, added, added_norms, rotary, text_first=True)
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
    blocks = EASYANIMATE_BLOCKS
    block_modules = EASYANIMATE_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout("first", arguments={"image_rotary_emb": along({2: 0})})

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
