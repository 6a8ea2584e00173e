"""CogVideoX 2B/5B/1.5 and ConsisID: one joint stream, text tokens before the video tokens, no mask."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vdit_fast.models.base import (
    CROSS_ATTENTION,
    ModelAdapter,
    ServedProcessor,
    patch_grid,
    split_heads,
)
from vdit_fast.models.cogvideox_block import COGVIDEOX_BLOCKS, COGVIDEOX_MODULES
from vdit_fast.models.joint import join
from vdit_fast.models.qk import pair_rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["CogVideoXAdapter", "CogVideoXProcessor"]


class CogVideoXProcessor(ServedProcessor):
    """Joint attention over [text, video]: LayerNorm per head, RoPE (5B and 1.5) on the video tokens."""

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
        joint = join(encoder_hidden_states, hidden_states)
        rotary = pair_rotary(image_rotary_emb, hidden_states, start=text)
        heads, norms = split_heads(attn, joint), (attn.norm_q, attn.norm_k)
        query, key, value = turned_heads(self, heads, norms, rotary)
        out = served_attention(query, key, value, self.handle, anchor=anchor).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


class CogVideoXAdapter(ModelAdapter):
    family = "cogvideox"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"CogVideoXAttnProcessor2_0": CogVideoXProcessor}
    blocks = COGVIDEOX_BLOCKS
    block_modules = COGVIDEOX_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout("first", arguments={"image_rotary_emb": along({2: 0})})
    references = None

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if getattr(module, "is_cross_attention", False):
            return CROSS_ATTENTION
        return super().skip_reason(name, module, processor)

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        text = arguments.get("encoder_hidden_states")
        config = getattr(module, "config", None)
        patch = getattr(config, "patch_size", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not isinstance(text, Tensor):
            return None
        if not isinstance(patch, int):
            return None
        patch_t = getattr(config, "patch_size_t", None) or 1
        _, frames, _, height, width = latents.shape
        grid = patch_grid((frames, height, width), (patch_t, patch, patch))
        return Geometry(grid, text=text.shape[1], text_first=True)


register(CogVideoXAdapter())
