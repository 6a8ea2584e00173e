"""HunyuanVideo (T2V, I2V by concatenation or token replacement) and Framepack: dual- and single-stream blocks, text
tokens after the video tokens.

The text is padded on the right, so the stock [B, 1, 1, N] mask says no more than one number of valid keys per batch
item. Padded queries attend like all others, as they do in the stock model. The token refiner has another processor.
Framepack puts the tokens of earlier clips before the video, and for one clip it cuts the padded text off.
"""

from __future__ import annotations

import math
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
from vdit_fast.models.joint import join
from vdit_fast.models.qk import joint_heads, pair_rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["HunyuanVideoAdapter", "HunyuanVideoProcessor"]

_HISTORY = (
    ("latents_clean", "indices_latents_clean", (1, 2, 2), False),
    ("latents_history_2x", "indices_latents_history_2x", (2, 4, 4), True),
    ("latents_history_4x", "indices_latents_history_4x", (4, 8, 8), True),
)
"""Framepack's earlier clips: latents, their frame indices, patch (fixed, whatever ``patch_size``), whether the last
partial patch is padded or dropped."""


def _is_key_mask(mask: Tensor) -> bool:
    """A bool mask [B, 1, 1, N] whose valid keys come first, the only form the model makes."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return False
    return is_prefix_mask(mask)


class HunyuanVideoProcessor(ServedProcessor):
    """Joint attention: RMSNorm per head, RoPE on the video tokens, then [video, text]."""

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
        known_mask = attention_mask is None or _is_key_mask(attention_mask)
        if self.stands_aside(None if known_mask else attention_mask):
            stock: tuple[Tensor, Tensor | None] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        text = encoder_hidden_states.shape[1] if encoder_hidden_states is not None else 0
        dual = attn.add_q_proj is not None and encoder_hidden_states is not None
        if encoder_hidden_states is not None and not dual:
            hidden_states = join(hidden_states, encoder_hidden_states)
        heads, norms = split_heads(attn, hidden_states), (attn.norm_q, attn.norm_k)
        rotary = pair_rotary(image_rotary_emb, hidden_states, start=None if dual or not text else 0)
        if dual:
            assert encoder_hidden_states is not None
            added, added_norms = split_added_heads(attn, encoder_hidden_states), (attn.norm_added_q, attn.norm_added_k)
            query, key, value = joint_heads(self, heads, norms, added, added_norms, rotary)
        else:
            query, key, value = turned_heads(self, heads, norms, rotary)

        kv_len = attention_mask[:, 0, 0].sum(-1, dtype=torch.int32) if attention_mask is not None else None
        out = served_attention(query, key, value, self.handle, kv_len=kv_len, anchor=anchor)
        out = out.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out, None
        out, text_out = out[:, : out.shape[1] - text], out[:, out.shape[1] - text :]
        if getattr(attn, "to_out", None) is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "to_add_out", None) is not None:
            text_out = attn.to_add_out(text_out)
        return out, text_out


class HunyuanVideoAdapter(ModelAdapter):
    family = "hunyuan_video"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"HunyuanVideoAttnProcessor2_0": HunyuanVideoProcessor}
    blocks = HUNYUAN_BLOCKS
    block_modules = HUNYUAN_MODULES
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    rows = RowLayout(
        "first",
        arguments={"freqs_cis": along({2: 0}), "image_rotary_emb": along({2: 0})},
        joint={"attention_mask": along({4: 3})},
        refused={"token_replace_emb": "the tokens of the first frame have a modulation of their own"},
        leading={"token_replace_emb": "num_tokens"},
    )

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        text = arguments.get("encoder_hidden_states")
        config = getattr(module, "config", None)
        patch, patch_t = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not isinstance(text, Tensor):
            return None
        if not isinstance(patch, int) or not isinstance(patch_t, int):
            return None
        batch, _, frames, height, width = latents.shape
        grid = patch_grid((frames, height, width), (patch_t, patch, patch))
        if "indices_latents" not in arguments:  # Framepack always has them
            return Geometry(grid, text=text.shape[1])
        image = arguments.get("image_embeds")
        if not isinstance(image, Tensor):
            return None
        known = text.shape[1] + image.shape[1] if batch > 1 else None
        return Geometry(grid, text=known, history=_history_tokens(arguments))


def _history_tokens(arguments: dict[str, Any]) -> int:
    """Tokens of Framepack's earlier clips, latents [B, C, F, H, W]."""
    tokens = 0
    for name, indices, patch, padded in _HISTORY:
        latents = arguments.get(name)
        if latents is not None and arguments.get(indices) is not None:
            sizes = zip(latents.shape[2:], patch, strict=True)
            tokens += math.prod(-(-size // cut) if padded else size // cut for size, cut in sizes)
    return tokens


register(HunyuanVideoAdapter())
