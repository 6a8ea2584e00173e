"""LTX-2 (2.0 to 2.5): video and audio streams with a self-attention each, everything else by cross-attention.

Six modules per block share the processor class: the two self-attentions are served, those to the text are left alone,
and those between the streams run by their stock processors, for which norm and RoPE are fused. The audio tokens are a
line in time, so planners see the video layers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vdit_fast.models.base import ModelAdapter, ServedProcessor
from vdit_fast.models.fusion import rounding_for
from vdit_fast.models.ltx2_block import LTX2_BLOCKS, LTX2_MODULES
from vdit_fast.models.qk import Rotary, rotate_pairs, turn_keys, turned_heads
from vdit_fast.models.registry import register
from vdit_fast.models.served import served_attention
from vdit_fast.models.session import Geometry

__all__ = ["LTX2Adapter", "LTX2PerturbedProcessor", "LTX2Processor"]


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of every head of x [B, N, H, D] with channel i + D/2, by tables [B, N, H, D/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _interleaved(cos: Tensor, sin: Tensor, heads: int) -> Rotary:
    """The rotation by tables [B, N, H * D] over the whole width: neighbouring channels, every value repeated."""
    cos, sin = (table.unflatten(2, (heads, -1)) for table in (cos, sin))
    return Rotary(cos, sin, lambda x: rotate_pairs(x, cos, sin))


def _split(cos: Tensor, sin: Tensor, heads: int) -> Rotary:
    """The rotation of the halves of every head, by tables [B, H, N, D/2]."""
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return Rotary(cos, sin, lambda x: _rotate_halves(x, cos, sin), layout="half")


_Tables = tuple[Tensor, Tensor]
"""cos and sin, as the model makes them."""
_Norm = Callable[[Tensor], Tensor]
_ROTATIONS = {"interleaved": _interleaved, "split": _split}
_BETWEEN = "cross-attention between video and audio"
_OWN_TABLES = "the keys have rotary tables of their own"


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
        query_rotary_emb: _Tables | None = None,
        key_rotary_emb: _Tables | None = None,
    ) -> Tensor:
        reason = None if key_rotary_emb is None else _OWN_TABLES
        if encoder_hidden_states is not None or self.stands_aside(attention_mask, reason):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb
            )
            return stock
        out = self._attend(attn, hidden_states, attn.to_v(hidden_states), query_rotary_emb)
        return self._project(attn, hidden_states, out)

    def _attend(self, attn: Any, tokens: Tensor, value: Tensor, rotary_emb: _Tables | None) -> Tensor:
        """Attention of tokens [B, N, C] with projected values [B, N, H * D] -> [B, N, H * D]."""
        query, key = attn.to_q(tokens), attn.to_k(tokens)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        anchor = rotary = None
        if rotary_emb is not None:
            anchor, rotary = rotary_emb[0], _ROTATIONS[attn.rope_type](*rotary_emb, attn.heads)
        norms = attn.norm_q, attn.norm_k
        query, key, value = turned_heads(self, (query, key, value), norms, rotary, across=True)
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
        query_rotary_emb: _Tables | None = None,
        key_rotary_emb: _Tables | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Tensor | bool | None = None,
    ) -> Tensor:
        reason = None if key_rotary_emb is None else _OWN_TABLES
        if encoder_hidden_states is not None or self.stands_aside(attention_mask, reason):
            stock: Tensor = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb,
                perturbation_mask, all_perturbed,
            )  # fmt: skip
            return stock
        value = attn.to_v(hidden_states)
        if _all_perturbed(perturbation_mask, all_perturbed):
            return self._project(attn, hidden_states, value)
        out = self._attend(attn, hidden_states, value, query_rotary_emb)
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask.to(out))
        return self._project(attn, hidden_states, out)


class _Turned:
    """An attention module as its stock processor sees it: its norms of q and k rotate, too."""

    def __init__(self, attn: Any, norm_q: _Norm, norm_k: _Norm) -> None:
        self._attn, self.norm_q, self.norm_k = attn, norm_q, norm_k

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class LTX2CrossProcessor(ServedProcessor):
    """Attention between video and audio by the stock processor, which gets q and k normed and rotated in one pass."""

    attends = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: _Tables | None = None,
        key_rotary_emb: _Tables | None = None,
    ) -> Tensor:
        view, *tables = self._turned(attn, hidden_states, query_rotary_emb, key_rotary_emb)
        out: Tensor = self.stock(view, hidden_states, encoder_hidden_states, attention_mask, *tables)
        return out

    def _turned(
        self, attn: Any, tokens: Tensor, query_table: _Tables | None, key_table: _Tables | None
    ) -> tuple[Any, _Tables | None, _Tables | None]:
        """The module and the tables for the stock processor: a view of the module without tables, or both as they are,
        where the fused operator cannot run."""
        norms = attn.norm_q, attn.norm_k
        if query_table is None or key_table is None or self._parallel_config is not None:
            return attn, query_table, key_table
        if rounding_for(self.session, tokens, norms) is None:
            return attn, query_table, key_table

        def turn(norm: Any, table: _Tables) -> _Norm:
            rotary = _ROTATIONS[attn.rope_type](*table, attn.heads)
            return lambda x: turn_keys(self, x.unflatten(2, (attn.heads, -1)), norm, rotary, across=True).flatten(2)

        return _Turned(attn, turn(norms[0], query_table), turn(norms[1], key_table)), None, None


class LTX2PerturbedCrossProcessor(LTX2CrossProcessor):
    """The same with the parameters of spatio-temporal guidance, which the blocks leave out here."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: _Tables | None = None,
        key_rotary_emb: _Tables | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Tensor | bool | None = None,
    ) -> Tensor:
        view, *tables = self._turned(attn, hidden_states, query_rotary_emb, key_rotary_emb)
        told = (perturbation_mask, all_perturbed)
        out: Tensor = self.stock(view, hidden_states, encoder_hidden_states, attention_mask, *tables, *told)
        return out


class LTX2Adapter(ModelAdapter):
    family = "ltx2"
    processors: ClassVar[dict[str, type[ServedProcessor]]] = {
        "LTX2AudioVideoAttnProcessor": LTX2Processor,
        "LTX2PerturbedAttnProcessor": LTX2PerturbedProcessor,
    }
    turned: ClassVar[dict[str, type[ServedProcessor]]] = {
        "LTX2AudioVideoAttnProcessor": LTX2CrossProcessor,
        "LTX2PerturbedAttnProcessor": LTX2PerturbedCrossProcessor,
    }
    blocks = LTX2_BLOCKS
    block_modules = LTX2_MODULES
    block_lists = ("transformer_blocks",)
    block_streams = ("hidden_states", "audio_hidden_states")
    rows = "the audio reads the video tokens by a cross-attention whose keys are not kept"

    def skip_reason(self, name: str, module: nn.Module, processor: Any) -> str | None:
        place = name.rpartition(".")[2]
        if place in ("audio_to_video_attn", "video_to_audio_attn"):
            return _BETWEEN
        if place in ("attn2", "audio_attn2"):
            return "cross-attention"
        if "_connector." in name:
            return "self-attention over the text, once per prompt"
        if getattr(module, "rope_type", None) not in _ROTATIONS:
            return f"rotary embedding {getattr(module, 'rope_type', None)!r} is not understood"
        return super().skip_reason(name, module, processor)

    def processor_beside(self, name: str, module: nn.Module, processor: Any) -> type[ServedProcessor] | None:
        known = self.turned.get(type(processor).__name__)
        if known is None or self.skip_reason(name, module, processor) != _BETWEEN:
            return None
        rotates = getattr(module, "rope_type", None) in _ROTATIONS
        return known if rotates and super().skip_reason(name, module, processor) is None else None

    def dense_reason(self, name: str, module: nn.Module) -> str | None:
        return "audio tokens have no video grid" if name.rpartition(".")[2] == "audio_attn1" else None

    def modulated_by_timestep(self, arguments: dict[str, Any]) -> bool:
        """Not where the video's rows toward the audio stem from noise levels per audio token."""
        sigma = arguments.get("audio_sigma")
        sigma = arguments.get("sigma") if sigma is None else sigma
        per_token = isinstance(sigma, Tensor) and sigma.ndim > 1 and sigma.shape[1] > 1
        return not (arguments.get("use_cross_timestep") and per_token)

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
