"""The blocks of LTX-2 through fused operators: a video and an audio stream, which also read each other.

Every residual and the norm after it are one pass. The norms before the attentions between the streams are modulated
twice, for what a stream asks and for what it answers, which takes one pass more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, OneStream
from vdit_fast.models.fusion import BlockForward, as_rows, distinct_rows, fused_rounding, stock_forward
from vdit_fast.ops.adaln import adaln_modulate, gate_residual, gate_residual_norm
from vdit_fast.reference.adaln import Rounding, Table

__all__ = ["LTX2_BLOCKS", "LTX2_MODULES"]

_NORMS = (
    "norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3", "audio_to_video_norm",
    "video_to_audio_norm",
)  # fmt: skip
_TABLES = (
    "scale_shift_table", "audio_scale_shift_table", "video_a2v_cross_attn_scale_shift_table",
    "audio_a2v_cross_attn_scale_shift_table",
)  # fmt: skip
_PROMPT_TABLES = ("prompt_scale_shift_table", "audio_prompt_scale_shift_table")


def _pairs(table: Tensor, rows: Tensor) -> list[Table]:
    """Rows of a table [n, D] with those of the timestep [Bt, R, n, D] that are added to them."""
    return list(zip(table.unbind(0), rows.unbind(2), strict=True))


@dataclass
class _Stream:
    """One of the two streams while its block runs."""

    block: Any
    prefix: str
    x: Tensor
    rows: list[Table]
    """shift, scale and gate of self-attention and of the feed-forward, in newer models also of the text."""
    cross_rows: list[Table]
    """scale and shift where the video reads, scale and shift where the audio does, and this stream's gate."""
    index: Tensor | None
    rounding: Rounding

    def part(self, name: str) -> Any:
        """A sub-module or parameter of this stream."""
        return getattr(self.block, self.prefix + name)

    @property
    def cross_norm(self) -> Any:
        return self.block.video_to_audio_norm if self.prefix else self.block.audio_to_video_norm

    @property
    def text_gate(self) -> Table | None:
        return self.rows[8] if len(self.rows) > 6 else None

    def modulate(self, norm: Any, scale: Table, shift: Table) -> Tensor:
        return adaln_modulate(
            self.x, scale, shift, index=self.index, norm="rms", eps=norm.eps, weight=norm.weight,
            rounding=self.rounding,
        )  # fmt: skip

    def add(
        self, y: Tensor, gate: Table | None, norm: Any, scale: Table | None = None, shift: Table | None = None
    ) -> Tensor:
        """Add y under its gate; returns the modulated norm of the sum."""
        self.x, h = gate_residual_norm(
            self.x, y, gate, scale, shift, index=self.index, norm="rms", eps=norm.eps, weight=norm.weight,
            rounding=self.rounding,
        )  # fmt: skip
        return h

    def attend(self, told: Mapping[str, Any]) -> Tensor:
        """Add self-attention; returns what asks the text."""
        shift, scale, gate = self.rows[:3]
        h = self.modulate(self.part("norm1"), scale, shift)
        y = self.part("attn1")(hidden_states=h, encoder_hidden_states=None, **told)
        text_shift, text_scale = self.rows[6:8] if len(self.rows) > 6 else (None, None)
        return self.add(y, gate, self.part("norm2"), text_scale, text_shift)

    def read_text(self, h: Tensor, text: Tensor, mask: Tensor | None, prompt: Tensor | None) -> Tensor:
        """What the text adds: h asks; ``prompt`` [B, 1, 2 * D], with the timestep, modulates the text."""
        if self.block.cross_attn_adaln:
            table = self.part("prompt_scale_shift_table")
            if prompt is None:  # the same in all steps
                shift, scale = table.to(self.x.dtype).unbind(0)
            else:
                shift, scale = _pairs(table, prompt.unflatten(-1, table.shape))
            text = adaln_modulate(as_rows(text), scale, shift, norm="none", rounding=self.rounding)
        y: Tensor = self.part("attn2")(h, encoder_hidden_states=text, query_rotary_emb=None, attention_mask=mask)
        return y

    def finish(self, y: Tensor | None, gate: Table | None) -> Tensor:
        """Add y, where there is any, and the feed-forward."""
        shift, scale, mlp_gate = self.rows[3:6]
        norm = self.part("norm3")
        h = self.modulate(norm, scale, shift) if y is None else self.add(y, gate, norm, scale, shift)
        return gate_residual(self.x, self.part("ff")(h), mlp_gate, index=self.index, rounding=self.rounding)


def _stream(
    block: Any, prefix: str, x: Tensor, temb: Tensor, cross: Tensor, cross_gate: Tensor, rounding: Rounding
) -> _Stream:
    """A stream with its rows of modulation. Rows per token of the video stem from the transformer's ``timestep``, whose
    distinct ones may be known; those of the audio have an argument of their own."""
    between = getattr(block, f"{prefix or 'video_'}a2v_cross_attn_scale_shift_table")
    tables = (getattr(block, f"{prefix}scale_shift_table"), between[:4], between[4:])
    pairs: list[list[Table]] = []
    index = None
    for table, flat in zip(tables, (temb, cross, cross_gate), strict=True):
        rows = flat.unflatten(-1, table.shape)
        if not prefix and rows.shape[1] > 1:
            rows, index = distinct_rows(block, rows, -2)
        pairs.append(_pairs(table, rows))
    return _Stream(block, prefix, as_rows(x), pairs[0], [*pairs[1], *pairs[2]], index, rounding)


def _between(
    video: _Stream, audio: _Stream, texts: list[Tensor], to_video: bool, to_audio: bool, tables: list[Any],
    masks: list[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Add what the text gave to either stream; returns what they give each other, None where they do not.

    Args:
        tables: of the rotary embeddings between the streams, of the video's and of the audio's tokens.
        masks: where the video reads and where the audio does.
    """
    streams, reads = (video, audio), (to_video, to_audio)
    found: list[dict[int, Tensor]] = []
    for stream, y in zip(streams, texts, strict=True):
        rows: dict[int, Tensor] = {}
        for way in (0, 1):
            scale, shift = stream.cross_rows[2 * way : 2 * way + 2]
            if reads[way] and rows:
                rows[way] = stream.modulate(stream.cross_norm, scale, shift)
            elif reads[way]:
                rows[way] = stream.add(y, stream.text_gate, stream.cross_norm, scale, shift)
        found.append(rows)
    modules = (video.block.audio_to_video_attn, video.block.video_to_audio_attn)
    return [
        modules[way](
            found[way][way],
            encoder_hidden_states=found[1 - way][way],
            query_rotary_emb=tables[way],
            key_rotary_emb=tables[1 - way],
            attention_mask=masks[way],
        )
        if reads[way]
        else None
        for way in (0, 1)
    ]


def _block() -> BlockForward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Any = None,
        audio_rotary_emb: Any = None,
        ca_video_rotary_emb: Any = None,
        ca_audio_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> tuple[Tensor, Tensor]:
        names = _TABLES + (_PROMPT_TABLES if self.cross_attn_adaln else ())
        norms, tables = [getattr(self, name) for name in _NORMS], [getattr(self, name) for name in names]
        rounding = fused_rounding(self, hidden_states, norms, ("RMSNorm",), *tables)
        if rounding is None:
            return stock_forward(self)(
                hidden_states, audio_hidden_states, encoder_hidden_states, audio_encoder_hidden_states, temb,
                temb_audio, temb_ca_scale_shift, temb_ca_audio_scale_shift, temb_ca_gate, temb_ca_audio_gate,
                temb_prompt, temb_prompt_audio, video_rotary_emb, audio_rotary_emb, ca_video_rotary_emb,
                ca_audio_rotary_emb, encoder_attention_mask, audio_encoder_attention_mask, self_attention_mask,
                audio_self_attention_mask, a2v_cross_attention_mask, v2a_cross_attention_mask,
                use_a2v_cross_attention, use_v2a_cross_attention, perturbation_mask, all_perturbed,
            )  # fmt: skip
        told = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}
        video = _stream(self, "", hidden_states, temb, temb_ca_scale_shift, temb_ca_gate, rounding)
        audio = _stream(
            self, "audio_", audio_hidden_states, temb_audio, temb_ca_audio_scale_shift, temb_ca_audio_gate, rounding
        )
        h = video.attend({"query_rotary_emb": video_rotary_emb, "attention_mask": self_attention_mask, **told})
        audio_h = audio.attend(
            {"query_rotary_emb": audio_rotary_emb, "attention_mask": audio_self_attention_mask, **told}
        )
        y = video.read_text(h, encoder_hidden_states, encoder_attention_mask, temb_prompt)
        audio_y = audio.read_text(audio_h, audio_encoder_hidden_states, audio_encoder_attention_mask, temb_prompt_audio)
        if not use_a2v_cross_attention and not use_v2a_cross_attention:
            return video.finish(y, video.text_gate), audio.finish(audio_y, audio.text_gate)
        read, audio_read = _between(
            video,
            audio,
            [y, audio_y],
            use_a2v_cross_attention,
            use_v2a_cross_attention,
            [ca_video_rotary_emb, ca_audio_rotary_emb],
            [a2v_cross_attention_mask, v2a_cross_attention_mask],
        )
        return video.finish(read, video.cross_rows[4]), audio.finish(audio_read, audio.cross_rows[4])

    return forward


LTX2_BLOCKS: dict[str, BlockForward] = {"LTX2VideoTransformerBlock": _block()}

Gate = tuple[Tensor, Tensor]


def _gate(table: Tensor, temb: Tensor, row: int) -> Gate:
    """One row of a table [n, D] and of the timestep's [B, N or 1, n * D], which are added."""
    return table[row], temb.unflatten(-1, (table.shape[0], -1))[:, :, row]


class _Modules(OneStream):
    """Self-attention, cross-attention with the text and with the other stream, and feed-forward of either stream."""

    memory = "attention of the audio stream is served too, and nobody says what memory that reads"
    hooked = (
        "attn1", "attn2", "audio_to_video_attn", "ff", "audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff",
    )  # fmt: skip

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return {name: (int(at > 3),) for at, name in enumerate(self.hooked)}

    def modulated(self, block: Any, arguments: Mapping[str, Any]) -> Tensor:
        shift, scale = (sum(_gate(block.scale_shift_table, arguments["temb"], row)) for row in (0, 1))
        normed: Tensor = block.norm1(arguments["hidden_states"])
        return normed * (1 + scale) + shift

    def forecast(self, block: Any, arguments: Mapping[str, Any], forecast: Forecast) -> tuple[Tensor, Tensor]:
        video, audio = arguments["hidden_states"], arguments["audio_hidden_states"]
        table, temb = block.scale_shift_table, arguments["temb"]
        audio_table, audio_temb = block.audio_scale_shift_table, arguments["temb_audio"]
        other = _gate(block.video_a2v_cross_attn_scale_shift_table[4:], arguments["temb_ca_gate"], 0)
        audio_other = _gate(block.audio_a2v_cross_attn_scale_shift_table[4:], arguments["temb_ca_audio_gate"], 0)
        return (
            forecast.add(
                video,
                {
                    "attn1": _gate(table, temb, 2),
                    "attn2": _gate(table, temb, 8) if block.video_cross_attn_adaln else None,
                    "audio_to_video_attn": other,
                    "ff": _gate(table, temb, 5),
                },
            ),
            forecast.add(
                audio,
                {
                    "audio_attn1": _gate(audio_table, audio_temb, 2),
                    "audio_attn2": _gate(audio_table, audio_temb, 8) if block.audio_cross_attn_adaln else None,
                    "video_to_audio_attn": audio_other,
                    "audio_ff": _gate(audio_table, audio_temb, 5),
                },
            ),
        )


LTX2_MODULES: dict[str, BlockModules] = {"LTX2VideoTransformerBlock": _Modules()}
