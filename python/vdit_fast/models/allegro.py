"""Allegro: self-attention over the video tokens, text by cross-attention.

The transformer may be given a mask of the latents, from which it makes an additive mask of the keys. One that hides
nothing is dropped before the forward. Whether it hides something is looked at on a CPU only: elsewhere it would wait
for the device, so there a model that was given a mask runs the stock way (the pipeline gives none).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from vdit_fast.models.allegro_block import ALLEGRO_BLOCKS, ALLEGRO_MODULES
from vdit_fast.models.base import ModelAdapter, ServedProcessor, patch_grid, split_heads
from vdit_fast.models.qk import Rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, Take
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["AllegroAdapter", "AllegroProcessor"]

_Tables = tuple[tuple[tuple[Tensor, Tensor], ...], tuple[Tensor, ...]]
"""(cos, sin) [positions, D/3] of each axis, and each token's position on that axis, [1, N]."""

_MASKED = "video tokens are masked (pass attention_mask=None where the mask hides nothing)"


def _token_tables(tables: _Tables) -> tuple[Tensor, Tensor]:
    """cos, sin [1, N, 1, D]: the three axes' values of every token, side by side."""
    cos, sin = (
        torch.cat([functional.embedding(at, axis[part]) for axis, at in zip(*tables, strict=True)], dim=-1)
        for part in (0, 1)
    )
    return cos.unsqueeze(2), sin.unsqueeze(2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, H, D] by halves within each third of the channels: products in fp32, then x's dtype."""
    first, second = x.unflatten(-1, (3, 2, -1)).unbind(-2)
    turned = torch.stack((-second, first), dim=-2).flatten(-3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def _rotary(tables: _Tables, width: int) -> Rotary:
    cos, sin = _token_tables(tables)
    return Rotary(cos, sin, lambda x: _rotate(x, cos, sin), layout="half", axes=(width,) * 3)


def _some_positions(tables: _Tables, take: Take) -> _Tables:
    """The rotary tables with the positions of some tokens."""
    values, places = tables
    return values, tuple(take(axis, 1) for axis in places)


class AllegroProcessor(ServedProcessor):
    """No norm; RoPE by halves per axis. Heads of 96 channels."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: _Tables | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or self.stands_aside(attention_mask, why=_MASKED):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb
            )
            return stock
        heads = split_heads(attn, hidden_states)
        rotary = _rotary(image_rotary_emb, heads[0].shape[-1] // 3) if image_rotary_emb is not None else None
        query, key, value = turned_heads(self, heads, (attn.norm_q, attn.norm_k), rotary)
        # The tables come from the pipeline: there is no tensor that tells forwards apart.
        out = served_attention(query, key, value, self.handle)
        out = out.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


class AllegroAdapter(ModelAdapter):
    family = "allegro"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {"AllegroAttnProcessor2_0": AllegroProcessor}
    blocks = ALLEGRO_BLOCKS
    block_modules = ALLEGRO_MODULES
    block_lists = ("transformer_blocks",)
    rows = RowLayout("last", arguments={"image_rotary_emb": _some_positions}, refused={"attention_mask": _MASKED})

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if getattr(module, "is_cross_attention", False):
            return "cross-attention"
        plain = {"spatial_norm": None, "group_norm": None, "residual_connection": False, "rescale_output_factor": 1.0}
        for setting, value in plain.items():
            if getattr(module, setting, value) != value:
                return f"attention with {setting} is not understood"
        return super().skip_reason(name, module, processor)

    def simplify(self, module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        latents, mask = arguments.get("hidden_states"), arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.device.type != "cpu":
            return {}
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not bool(mask[:, : latents.shape[2]].all()):
            return {}
        return {"attention_mask": None}

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        config = getattr(module, "config", None)
        patch, patch_t = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5:
            return None
        if not isinstance(patch, int) or not isinstance(patch_t, int):
            return None
        _, _, frames, height, width = latents.shape
        return Geometry(patch_grid((frames, height, width), (patch_t, patch, patch)))


register(AllegroAdapter())
