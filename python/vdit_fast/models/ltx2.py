"""LTX-2 (2.0 to 2.5): video and audio streams with a self-attention each, everything else by cross-attention.

Six modules per block share the processor class: the two self-attentions are served, those to the text and between the
streams are left alone. The audio tokens are a line in time, so planners see the video layers only.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor
from vdit_fast.models.ltx2_block import LTX2_MODULES
from vdit_fast.models.qk import rotate_pairs
from vdit_fast.models.registry import register
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["LTX2Adapter", "LTX2PerturbedProcessor", "LTX2Processor"]


def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs over the whole width of x [B, N, H, D], by tables [B, N, H * D]."""
    return rotate_pairs(x, cos.unflatten(2, x.shape[2:]), sin.unflatten(2, x.shape[2:]))


def _rotate_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of every head of x [B, N, H, D] with channel i + D/2, by tables [B, H, N, D/2]."""
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


_ROTATIONS = {"interleaved": _rotate_interleaved, "split": _rotate_split}


def _all_perturbed(mask: Tensor | None, known: Tensor | bool | None) -> bool:
    """Whether no batch item attends, as told or by a mask that is 0 everywhere.

    Tensors are looked at on a CPU only, and never by the compiler: elsewhere the attention runs, and the mask takes
    all of it away again.
    """
    if known is None and mask is not None:
        known = mask.count_nonzero() == 0
    if isinstance(known, Tensor) and (known.device.type != "cpu" or torch.compiler.is_compiling()):
        return False
    return bool(known)


class LTX2Processor(ServedProcessor):
    """RMSNorm across heads, RoPE in one of two pairings, an optional gate per head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or self.stands_aside(attention_mask):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb
            )
            return stock
        out = self._attend(attn, hidden_states, attn.to_v(hidden_states), query_rotary_emb, key_rotary_emb)
        return self._project(attn, hidden_states, out)

    def _attend(
        self,
        attn: Any,
        tokens: Tensor,
        value: Tensor,
        query_rotary_emb: tuple[Tensor, Tensor] | None,
        key_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention of tokens [B, N, C] with projected values [B, N, H * D] -> [B, N, H * D]."""
        query, key = attn.norm_q(attn.to_q(tokens)), attn.norm_k(attn.to_k(tokens))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        anchor = None
        if query_rotary_emb is not None:
            anchor = query_rotary_emb[0]
            rotate = _ROTATIONS[attn.rope_type]
            query = rotate(query, *query_rotary_emb)
            key = rotate(key, *(query_rotary_emb if key_rotary_emb is None else key_rotary_emb))
        return served_attention(query, key, value, self.handle, anchor=anchor).flatten(2, 3).to(query.dtype)

    def _project(self, attn: Any, tokens: Tensor, out: Tensor) -> Tensor:
        """Gates per head, from the tokens that came in, and the output projection."""
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(tokens))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


class LTX2PerturbedProcessor(LTX2Processor):
    """The same with spatio-temporal guidance: where the perturbation mask is 0, the values take attention's place."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Tensor | bool | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or self.stands_aside(attention_mask):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb,
                perturbation_mask, all_perturbed,
            )  # fmt: skip
            return stock
        value = attn.to_v(hidden_states)
        if _all_perturbed(perturbation_mask, all_perturbed):
            return self._project(attn, hidden_states, value)
        out = self._attend(attn, hidden_states, value, query_rotary_emb, key_rotary_emb)
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask.to(out))
        return self._project(attn, hidden_states, out)


class LTX2Adapter(ModelAdapter):
    family = "ltx2"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "LTX2AudioVideoAttnProcessor": LTX2Processor,
        "LTX2PerturbedAttnProcessor": LTX2PerturbedProcessor,
    }
    block_modules = LTX2_MODULES
    block_lists = ("transformer_blocks",)
    block_streams = ("hidden_states", "audio_hidden_states")
    rows = "the audio reads the video tokens by a cross-attention whose keys are not kept"

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        place = name.rpartition(".")[2]
        if place in ("audio_to_video_attn", "video_to_audio_attn"):
            return "cross-attention between video and audio"
        if place in ("attn2", "audio_attn2"):
            return "cross-attention"
        if "_connector." in name:
            return "self-attention over the text, once per prompt"
        if getattr(module, "rope_type", None) not in _ROTATIONS:
            return f"rotary embedding {getattr(module, 'rope_type', None)!r} is not understood"
        return super().skip_reason(name, module, processor)

    def dense_reason(self, name: str, module: nn.Module) -> str | None:
        return "audio tokens have no video grid" if name.rpartition(".")[2] == "audio_attn1" else None

    def geometry(self, module: nn.Module, arguments: dict[str, Any]) -> Geometry | None:
        sizes: tuple[Any, ...] = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        config = getattr(module, "config", None)
        patch: tuple[Any, ...] = tuple(
            getattr(config, name, None) for name in ("patch_size_t", "patch_size", "patch_size")
        )
        if not all(isinstance(size, int) for size in (*sizes, *patch)):
            return None
        frames, height, width = (-(-size // step) for size, step in zip(sizes, patch, strict=True))
        return Geometry((frames, height, width))


register(LTX2Adapter())
