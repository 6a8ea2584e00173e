"""Sana-Video (arXiv 2509.24695) and Sana for images (arXiv 2410.10629): self-attention that is linear by itself.

ReLU features, a state of all keys and values, and for the video RoPE of what the numerator sees only. No planner is
asked: there is no softmax to leave keys out of. Text comes in by cross-attention, which is left alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import CROSS_ATTENTION, ModelAdapter, ServedProcessor, split_heads
from vdit_fast.models.kernels import missing_linear_kernel
from vdit_fast.models.qk import Norms, Rotary, fused_options, normed
from vdit_fast.models.registry import register
from vdit_fast.models.sana_block import SANA_BLOCKS, SANA_MODULES
from vdit_fast.models.served_linear import served_linear_attention
from vdit_fast.models.session import Geometry
from vdit_fast.models.wan import wan_rotary
from vdit_fast.ops.qk_norm_rope import qk_norm_rope

__all__ = ["SanaAdapter", "SanaProcessor", "SanaVideoProcessor"]

LINEAR = "linear attention: not softmax"
"""Why no planner sees a layer."""

_CONVOLUTION = "its feed-forward is a convolution: a token needs the tokens around it"

Pair = tuple[Tensor, Tensor]
"""Of queries and keys, [B, N, H, D]."""


_ELSEWHERE = "keys of another sequence"


class SanaProcessor(ServedProcessor):
    """Linear attention of an image: one set of features for numerator and denominator."""

    linear = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        reason = None if encoder_hidden_states is None else _ELSEWHERE
        if not self.stands_aside(attention_mask, reason):
            query, key, value = split_heads(attn, hidden_states)
            if not self.stands_aside(reason=missing_linear_kernel(query)):
                query, key = _normed(self, (query, key), (attn.norm_q, attn.norm_k))
                out = served_linear_attention(query, key, value, self.handle, feature_map="relu")
                out = _projected(attn, out, hidden_states)
                return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out
        stock: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        return stock


class SanaVideoProcessor(ServedProcessor):
    """Linear attention of a video: the denominator's features are those of the numerator before RoPE."""

    linear = True
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
        rotary_emb = self.tables(rotary_emb, hidden_states)
        reason = None if encoder_hidden_states is None else _ELSEWHERE
        if rotary_emb is None:
            reason = "no rotary tables, which the stock processor needs"
        if not self.stands_aside(attention_mask, reason) and rotary_emb is not None:
            query, key, value = split_heads(attn, hidden_states)
            if not self.stands_aside(reason=missing_linear_kernel(query)):
                norms = attn.norm_q, attn.norm_k
                (query, key), (q_den, k_den) = _features(self, (query, key), norms, wan_rotary(*rotary_emb))
                out = served_linear_attention(
                    query, key, value, self.handle, feature_map="identity", q_den=q_den, k_den=k_den, anchor=anchor
                )
                return _projected(attn, out, hidden_states)
        stock: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return stock


def _projected(attn: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    projected: Tensor = attn.to_out[1](attn.to_out[0](out.flatten(2, 3).to(hidden_states.dtype)))
    return projected


def _normed(processor: ServedProcessor, pair: Pair, norms: Norms) -> Pair:
    """After the norms, which run over all heads' channels."""
    query, key = pair
    options = None if norms == (None, None) else fused_options(processor, query, norms, True)
    if options is None:
        return normed(query, norms[0], True), normed(key, norms[1], True)
    query, new_key, _ = qk_norm_rope(query, key, **options)
    assert new_key is not None
    return query, new_key


def _features(processor: ServedProcessor, pair: Pair, norms: Norms, rotary: Rotary) -> tuple[Pair, Pair]:
    """Features of the numerator and of the denominator: norm and ReLU, with and without RoPE."""
    query, key = pair
    options = fused_options(processor, query, norms, True)
    if options is None:
        q_den, k_den = (normed(x, norm, True).relu() for x, norm in zip(pair, norms, strict=True))
        return (rotary.stock(q_den), rotary.stock(k_den)), (q_den, k_den)
    turned_q, turned_k, _ = qk_norm_rope(query, key, relu=True, **options, **rotary.arguments())
    q_den, new_k_den, _ = qk_norm_rope(query, key, relu=True, **options)
    assert turned_k is not None and new_k_den is not None
    return (turned_q, turned_k), (q_den, new_k_den)


class SanaAdapter(ModelAdapter):
    family = "sana"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "SanaLinearAttnProcessor2_0": SanaProcessor,
        "SanaLinearAttnProcessor3_0": SanaVideoProcessor,
    }
    left_alone: ClassVar[dict[str, str]] = {"SanaAttnProcessor2_0": CROSS_ATTENTION}
    blocks = SANA_BLOCKS
    block_modules = SANA_MODULES
    block_lists = ("transformer_blocks",)
    block_streams = ("hidden_states",)
    rows = _CONVOLUTION
    stages = _CONVOLUTION
    text_inputs = ("encoder_hidden_states",)
    text_embedders = ("caption_projection", "caption_norm")

    def dense_reason(self, name: str, module: nn.Module) -> str | None:
        return LINEAR

    def attends_over(self, name: str, module: nn.Module) -> str | None:
        return "video"

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        latents = arguments.get("hidden_states")
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        if not isinstance(latents, Tensor):
            return None
        if latents.ndim == 4 and isinstance(patch, int):
            return Geometry((1, latents.shape[2] // patch, latents.shape[3] // patch))
        if latents.ndim != 5 or not isinstance(patch, (tuple, list)):
            return None
        frames, height, width = (size // of for size, of in zip(latents.shape[2:], patch, strict=True))
        return Geometry((frames, height, width))


register(SanaAdapter())
