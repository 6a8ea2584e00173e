"""Factorised space-time attention by diffusers' generic processor: Stable Video Diffusion, AnimateDiff, Latte.

Spatial attention runs within a frame, temporal attention along the frames of a place: 10^4 to 10^5 sequences of some
dozen rows, which is what ``short_attention`` is for. Neither has a video grid, so nothing here is ever sparse. Stable
Video Diffusion's cross-attention has one key, so its result is that key's value and queries need not be computed.

Image models, VAEs and text refiners use the same processor class, so the model's class decides.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor, patch_grid, split_heads
from vdit_fast.models.factorised_block import FACTORISED_BLOCKS
from vdit_fast.models.geometry import Volume
from vdit_fast.models.registry import register
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["FactorisedAdapter", "FactorisedProcessor"]

_ONE_KEY = "UNetSpatioTemporalConditionModel"
_MODELS = (_ONE_KEY, "UNetMotionModel", "LatteTransformer3DModel")
_TEMPORAL = ("temporal_transformer_blocks", "motion_modules")


class FactorisedProcessor(ServedProcessor):
    """Self-attention over the rows it is given, whatever they are, and cross-attention to one key."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self._must_run_stock(hidden_states, encoder_hidden_states, attention_mask):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return stock
        if encoder_hidden_states is None:
            query, key, value = split_heads(attn, hidden_states)
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
        else:
            value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
            query = key = value  # one row per sequence asks for it
            if _trains_scores(attn):
                query = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
                key = attn.to_k(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        out = served_attention(query, key, value, self.handle)
        out = attn.to_out[0](out.flatten(2, 3).to(query.dtype))
        out = attn.to_out[1](out.expand(-1, hidden_states.shape[1], -1))
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _must_run_stock(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None) -> bool:
        reason = None
        if hidden_states.ndim != 3:
            reason = f"the input has {hidden_states.ndim} dimensions, expected [batch, rows, channels]"
        elif encoder_hidden_states is not None and encoder_hidden_states.shape[1] != 1:
            reason = f"cross-attention to {encoder_hidden_states.shape[1]} keys instead of one"
        return self.stands_aside(mask, reason)


def _trains_scores(attn: Any) -> bool:
    """Whether weights are trained that only reach the scores: zero is a gradient that optimisers and DDP wait for."""
    if not torch.is_grad_enabled():
        return False
    return any(weight.requires_grad for part in (attn.to_q, attn.to_k) for weight in part.parameters())


def _norm_inside(module: nn.Module) -> bool:
    names = ("spatial_norm", "group_norm", "norm_cross", "add_k_proj")
    return any(getattr(module, name, None) is not None for name in names)


class FactorisedAdapter(ModelAdapter):
    family = "factorised"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "AttnProcessor": FactorisedProcessor,
        "AttnProcessor2_0": FactorisedProcessor,
    }
    blocks = FACTORISED_BLOCKS

    def root_reason(self, root: nn.Module, module: nn.Module, processor: Any) -> str | None:
        model, kind = type(root).__name__, type(processor).__name__
        if model not in _MODELS:
            return f"{kind} is used by many models and {model} is not one of {', '.join(_MODELS)}"
        if getattr(module, "is_cross_attention", False) and model != _ONE_KEY:
            return "cross-attention"
        return None

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        if _norm_inside(module):
            return "the attention module has a norm or keys of its own"
        if type(processor).__name__ == "AttnProcessor" and not getattr(module, "scale_qk", True):
            return "the scores are not scaled by head_dim ** -0.5"
        return super().skip_reason(name, module, processor)

    def dense_reason(self, name: str, module: nn.Module) -> str | None:
        over = self.attends_over(name, module)
        if over is None:
            return "cross-attention to one key"
        if over == "frames":
            return "temporal attention: one short sequence per place"
        return "spatial attention: one frame at a time"

    def attends_over(self, name: str, module: nn.Module) -> str | None:
        if getattr(module, "is_cross_attention", False):
            return None
        return "frames" if any(part in _TEMPORAL for part in name.split(".")) else "frame"

    def volume(self, module: nn.Module, arguments: dict[str, Any]) -> Volume | None:
        latents = arguments.get("sample", arguments.get("hidden_states"))
        if not isinstance(latents, Tensor) or latents.ndim != 5:
            return None
        batch, frames, height, width = (latents.shape[axis] for axis in (0, 2, 3, 4))
        if type(module).__name__ == _ONE_KEY:  # frames before channels
            frames = latents.shape[1]
        patch = getattr(getattr(module, "config", None), "patch_size", None) or 1
        return batch, *patch_grid((frames, height, width), (1, patch, patch))

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        return None


register(FactorisedAdapter())
