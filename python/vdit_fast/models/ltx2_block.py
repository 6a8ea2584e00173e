"""What a feature cache must know of the blocks of LTX-2, which has a video and an audio stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vdit_fast.models.block_modules import BlockModules, Forecast, Outputs

__all__ = ["LTX2_MODULES"]

Gate = tuple[Tensor, Tensor]


def _gate(table: Tensor, temb: Tensor, row: int) -> Gate:
    """One row of a table [n, D] and of the timestep's [B, N or 1, n * D], which are added."""
    return table[row], temb.unflatten(-1, (table.shape[0], -1))[:, :, row]


class _Modules:
    """Self-attention, cross-attention with the text and with the other stream, and feed-forward of either stream."""

    memory = "attention of the audio stream is served too, and nobody says what memory that reads"
    hooked = (
        "attn1", "attn2", "audio_to_video_attn", "ff", "audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff",
    )  # fmt: skip

    def parts(self, block: Any) -> dict[str, tuple[int, ...]]:
        return {name: (int(at > 3),) for at, name in enumerate(self.hooked)}

    def features(self, block: Any, outputs: Outputs) -> dict[str, Tensor]:
        return {name: outputs[name][0] for name in self.hooked}

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
