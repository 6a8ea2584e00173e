"""Wan 2.1/2.2 (T2V, I2V, TI2V) and models built of its blocks (VACE, Animate, ChronoEdit).

Self-attention runs over the video tokens only; text and image conditions enter by cross-attention, which is left
alone. Cross-attention modules share the processor class, so the module tells which is which. VACE's control blocks
attend to all tokens too and are served like the main ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import CROSS_ATTENTION, ModelAdapter, ServedProcessor, patch_grid
from vdit_fast.models.qk import Rotary, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.row_layout import RowLayout, along
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry
from vdit_fast.models.stage_layout import StageLayout, volume_of
from vdit_fast.models.wan_block import WAN_BLOCKS, WAN_MODULES

__all__ = ["WanAdapter", "WanProcessor", "rotate", "wan_rotary"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs of x [B, N, H, D] by cos, sin [1, N, 1, D] (each value repeated for its pair), with Wan's
    rounding: products in the tables' precision, then x's dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def wan_rotary(cos: Tensor, sin: Tensor) -> Rotary:
    """Wan's rotation; a model that is wholly in 16 bits has tables in 16 bits, and multiplies in them."""
    pair_cos, pair_sin = cos, sin
    if cos.shape[-1] // 3 % 2:
        # ChronoEdit cuts heads in thirds, and odd ones part the two channels of a pair: of their two values in the
        # tables the model reads the first cosine and the second sine.
        pair_cos, pair_sin = cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()
    return Rotary(pair_cos, pair_sin, lambda x: rotate(x, cos, sin), round_products=cos.dtype.itemsize == 2)


def wan_later_rotary(root: Any, latents: Tensor, first: int) -> Rotary:
    """Of the tokens from ``first`` on of a clip of this shape."""
    return wan_rotary(*(table[:, first:] for table in root.rope(latents)))


class WanProcessor(ServedProcessor):
    """Wan's self-attention: RMSNorm across heads before the head split, then interleaved RoPE."""

    takes_positions = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        anchor = rotary_emb[0] if rotary_emb is not None else None
        if encoder_hidden_states is None:
            rotary_emb = self.tables(rotary_emb, hidden_states)
        if encoder_hidden_states is not None or self.stands_aside(attention_mask):
            stock: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return stock
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        rotary = wan_rotary(*rotary_emb) if rotary_emb is not None else None
        query, key, value = turned_heads(self, (query, key, value), (attn.norm_q, attn.norm_k), rotary, across=True)
        out = served_attention(query, key, value, self.handle, anchor=anchor)
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


_BETWEEN = {"face_adapter": "each frame's tokens read the motion of a face between blocks, which needs whole frames"}


class WanAdapter(ModelAdapter):
    family = "wan"
    calls_per_branch = True
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "WanAttnProcessor": WanProcessor,
        "WanAttnProcessor2_0": WanProcessor,
    }
    blocks = WAN_BLOCKS
    block_modules = WAN_MODULES
    block_lists = ("blocks",)
    rows = RowLayout("last", arguments={"temb": along({4: 1}), "rotary_emb": along({4: 1})}, between=_BETWEEN)
    stages = StageLayout(
        models=("WanTransformer3DModel",),
        patch="patch_embedding",
        embedders=("condition_embedder",),
        patched=volume_of,
        later_rotary=wan_later_rotary,
    )

    left_alone: ClassVar[dict[str, str]] = {
        "WanAnimateFaceBlockAttnProcessor": "face cross-attention: each frame reads its own few motion tokens",
        "WanAnimate2AttnProcessor": "keys of a reference pass, read through a block mask of flex attention",
        "WanAnimate2CrossAttnProcessor": "cross-attention",
    }

    text_inputs = ("encoder_hidden_states", "encoder_hidden_states_image")
    text_embedders = ("condition_embedder.text_embedder", "condition_embedder.image_embedder")

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        # VACE's cross-attention says of itself that it is none in older diffusers, hence the name.
        is_cross = getattr(module, "is_cross_attention", False) or name.rpartition(".")[2] == "attn2"
        if is_cross or getattr(module, "cross_attention_dim_head", None) is not None:
            return CROSS_ATTENTION
        if getattr(module, "add_k_proj", None) is not None:
            return "attention with image keys and values"
        return super().skip_reason(name, module, processor)

    def frame_timesteps(self, module: nn.Module, timesteps: Tensor, latents: Tensor) -> dict[str, Any]:
        """As Wan 2.2 TI2V does it: [B, N], one per token."""
        if all(cls.__name__ != "WanTransformer3DModel" for cls in type(module).__mro__):  # VACE, Animate, ...
            return super().frame_timesteps(module, timesteps, latents)
        return {"timestep": timesteps.repeat_interleave(self._tokens_of_a_frame(module, latents), dim=1)}

    def _tokens_of_a_frame(self, module: nn.Module, latents: Tensor) -> int:
        config: Any = module.config
        patch = tuple(config.patch_size)
        if patch[0] != 1:
            raise RuntimeError(f"per-frame timesteps: patches of {patch} join frames; they need one frame per patch")
        return (latents.shape[3] // patch[1]) * (latents.shape[4] // patch[2])

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not isinstance(patch, (tuple, list)):
            return None
        _, _, frames, height, width = latents.shape
        return Geometry(patch_grid((frames, height, width), (patch[0], patch[1], patch[2])))


register(WanAdapter())
