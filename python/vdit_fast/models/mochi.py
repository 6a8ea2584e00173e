"""Mochi: one joint stream, the valid text tokens after the video tokens.

The stock processor takes the valid tokens of every prompt out of the batch, one host read and one attention call per
batch item and layer. Here the text rows are put in that order (valid ones first) before they are projected, and one
number of valid keys per batch item says the rest. Nothing is read on the host, and any mask of the prompt will do.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, patch_grid, split_added_heads, split_heads
from vdit_fast.models.mochi_block import MOCHI_BLOCKS, MOCHI_MODULES
from vdit_fast.models.qk import Rotary, joint_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["MochiAdapter", "MochiProcessor"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, N, H, D] by tables [N, H, D/2]: every head has frequencies of its own.
    Products in fp32, then x's dtype."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack(((even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)), dim=-1).flatten(-2)


def _rotary(cos: Tensor, sin: Tensor) -> Rotary:
    return Rotary(cos.unsqueeze(0), sin.unsqueeze(0), lambda x: _rotate(x, cos, sin))


class MochiProcessor(ServedProcessor):
    """Joint attention: RMSNorm per head, RoPE on the video tokens, then [video, valid text, padding]."""

    takes_positions = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        anchor = image_rotary_emb[0] if image_rotary_emb is not None else None
        image_rotary_emb = self.tables(image_rotary_emb, hidden_states)
        known_mask = attention_mask.shape == encoder_hidden_states.shape[:2]
        if self.stands_aside(None if known_mask else attention_mask):
            stock: tuple[Tensor, Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return stock
        padding = attention_mask == 0
        order = padding.to(torch.uint8).argsort(dim=1, stable=True)
        text = encoder_hidden_states.take_along_dim(order.unsqueeze(-1), dim=1)
        length = (~padding).sum(1, dtype=torch.int32)
        video = hidden_states.shape[1]

        rotary = None
        if image_rotary_emb is not None:
            rotary = _rotary(*image_rotary_emb)
        heads, added = split_heads(attn, hidden_states), split_added_heads(attn, text)
        norms, added_norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
        query, key, value = joint_heads(self, heads, norms, added, added_norms, rotary)

        out = served_attention(query, key, value, self.handle, kv_len=video + length, anchor=anchor).flatten(2, 3)
        out, text_out = out[:, :video], out[:, video:]
        beyond = torch.arange(text.shape[1], device=text.device) >= length[:, None]
        text_out = text_out.masked_fill(beyond.unsqueeze(-1), 0.0)  # what the stock model pads with
        out = attn.to_out[1](attn.to_out[0](out))
        if hasattr(attn, "to_add_out"):  # the last block has no text stream after it
            text_out = attn.to_add_out(text_out)
        return out, text_out


class MochiAdapter(ModelAdapter):
    family = "mochi"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"MochiAttnProcessor2_0": MochiProcessor}
    blocks = MOCHI_BLOCKS
    block_modules = MOCHI_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout("last", arguments={"image_rotary_emb": along({3: 0})})

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        text = arguments.get("encoder_hidden_states")
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not isinstance(text, Tensor):
            return None
        if not isinstance(patch, int):
            return None
        _, _, frames, height, width = latents.shape
        return Geometry(patch_grid((frames, height, width), (1, patch, patch)), text=text.shape[1])


register(MochiAdapter())
