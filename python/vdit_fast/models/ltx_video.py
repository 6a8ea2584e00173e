"""LTX-Video: self-attention over the video tokens, text by cross-attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor
from vdit_fast.models.registry import register
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["LTXVideoAdapter", "LTXVideoProcessor"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the whole width of x [B, N, C], before the head split; every value is repeated for its pair."""
    even, odd = x.unflatten(2, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class LTXVideoProcessor(ServedProcessor):
    """RMSNorm across heads and RoPE before the head split."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or self.stands_aside(attention_mask):
            stock: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return stock
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        anchor = None
        if image_rotary_emb is not None:
            anchor = image_rotary_emb[0]
            query, key = _rotate(query, *image_rotary_emb), _rotate(key, *image_rotary_emb)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        out = served_attention(query, key, value, self.handle, anchor=anchor)
        out = out.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


class LTXVideoAdapter(ModelAdapter):
    family = "ltx_video"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"LTXVideoAttnProcessor": LTXVideoProcessor}

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if name.rpartition(".")[2] == "attn2":
            return "cross-attention"
        return super().skip_reason(name, module, processor)

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if not isinstance(frames, int) or not isinstance(height, int) or not isinstance(width, int):
            return None
        return Geometry((frames, height, width))


register(LTXVideoAdapter())
