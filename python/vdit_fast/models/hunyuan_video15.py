"""HunyuanVideo-1.5: dual-stream blocks, text tokens (image, ByT5, MLLM) after the video tokens.

The model packs the valid text tokens first, so that its [B, L] text mask says no more than one number of valid keys
per batch item. The stock processor makes a mask of N x N from it in every block. The token refiner has another
processor.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import (
    ModelAdapter,
    ServedProcessor,
    is_prefix_mask,
    patch_grid,
    split_added_heads,
    split_heads,
)
from vdit_fast.models.hunyuan_video_block import HUNYUAN_BLOCKS, HUNYUAN_MODULES
from vdit_fast.models.qk import joint_heads, pair_rotary
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["HunyuanVideo15Adapter", "HunyuanVideo15Processor"]


class HunyuanVideo15Processor(ServedProcessor):
    """Joint attention over [video, text]: RMSNorm per head, RoPE on the video tokens."""

    takes_positions = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        anchor = image_rotary_emb[0] if image_rotary_emb is not None else None
        image_rotary_emb = self.tables(image_rotary_emb, hidden_states)
        text = encoder_hidden_states.shape[1] if encoder_hidden_states is not None else 0
        known = attention_mask is not None and attention_mask.shape[1:] == (text,) and is_prefix_mask(attention_mask)
        reason = None
        if encoder_hidden_states is None or attention_mask is None:
            reason = "not joint attention with a text mask"
        if self.stands_aside(None if known else attention_mask, reason):
            stock: tuple[Tensor, Tensor | None] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        assert encoder_hidden_states is not None and attention_mask is not None
        heads, added = split_heads(attn, hidden_states), split_added_heads(attn, encoder_hidden_states)
        norms, added_norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
        rotary = pair_rotary(image_rotary_emb, hidden_states)
        query, key, value = joint_heads(self, heads, norms, added, added_norms, rotary)

        video = hidden_states.shape[1]
        valid = attention_mask.bool()
        kv_len = valid.sum(-1, dtype=torch.int32) + video
        out = served_attention(query, key, value, self.handle, kv_len=kv_len, anchor=anchor)
        out = out.flatten(2, 3).to(query.dtype)
        # The stock mask lets padded queries read nothing; their rows are zeros.
        text_out = out[:, video:].masked_fill(~valid[..., None], 0.0)
        return attn.to_out[1](attn.to_out[0](out[:, :video])), attn.to_add_out(text_out)


class HunyuanVideo15Adapter(ModelAdapter):
    family = "hunyuan_video15"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"HunyuanVideo15AttnProcessor2_0": HunyuanVideo15Processor}
    blocks = HUNYUAN_BLOCKS
    block_modules = HUNYUAN_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout("first", arguments={"freqs_cis": along({2: 0})})

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        texts = [arguments.get(name) for name in names]
        config = getattr(module, "config", None)
        patch, patch_t = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5:
            return None
        if not isinstance(patch, int) or not isinstance(patch_t, int):
            return None
        text = 0
        for tokens in texts:
            if not isinstance(tokens, Tensor) or tokens.ndim != 3:
                return None
            text += tokens.shape[1]
        _, _, frames, height, width = latents.shape
        return Geometry(patch_grid((frames, height, width), (patch_t, patch, patch)), text=text)


register(HunyuanVideo15Adapter())
