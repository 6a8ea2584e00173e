"""LTX-Video: self-attention over the video tokens, text by cross-attention."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, split_heads
from vdit_fast.models.ltx_video_block import LTX_BLOCKS, LTX_MODULES
from vdit_fast.models.qk import Rotary, rotate_pairs, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["LTXVideoAdapter", "LTXVideoProcessor"]


def _rotary(cos: Tensor, sin: Tensor, heads: int) -> Rotary:
    """The rotation by tables [B, N, H * D] over the whole width: neighbouring channels, every value repeated."""
    cos, sin = (table.unflatten(2, (heads, -1)) for table in (cos, sin))
    return Rotary(cos, sin, lambda x: rotate_pairs(x, cos, sin))


class LTXVideoProcessor(ServedProcessor):
    """RMSNorm across heads and RoPE before the head split."""

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
            rotary = _rotary(*image_rotary_emb, attn.heads)
        heads, norms = split_heads(attn, hidden_states), (attn.norm_q, attn.norm_k)
        query, key, value = turned_heads(self, heads, norms, rotary, across=True)
        out = served_attention(query, key, value, self.handle, anchor=anchor)
        out = out.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


class LTXVideoAdapter(ModelAdapter):
    family = "ltx_video"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"LTXVideoAttnProcessor": LTXVideoProcessor}
    blocks = LTX_BLOCKS
    block_modules = LTX_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout("last", arguments={"temb": along({3: 1}), "image_rotary_emb": along({3: 1})})

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if name.rpartition(".")[2] == "attn2":
            return "cross-attention"
        return super().skip_reason(name, module, processor)

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        sizes: tuple[Any, ...] = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        if not all(isinstance(size, int) for size in sizes):
            return None
        frames, height, width = sizes
        return Geometry((frames, height, width))


register(LTXVideoAdapter())
