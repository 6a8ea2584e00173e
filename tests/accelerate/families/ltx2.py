"""Tiny LTX-2 transformers: 2.0, and 2.3 with gates, cross-attention modulation and perturbation."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, from_diffusers, sharpen

__all__ = ["BUILDERS"]


def ltx2(*, layers: int = 2, newer: bool = False) -> Built:
    torch.manual_seed(1)
    extra: dict[str, Any] = {}
    if newer:
        extra = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
        extra |= {"perturbed_attn": True, "rope_type": "split", "ff_bias": False}
    model = from_diffusers("LTX2VideoTransformer3DModel")(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=layers, caption_channels=16, **extra,
    )  # fmt: skip
    batch, frames, size, audio = 2, 3, 4, 11
    timestep = torch.full((batch, frames * size * size), 500.0)
    timestep[:, : size * size] = 0  # the first frame is a condition and has no noise
    inputs = {
        "hidden_states": torch.randn(batch, frames * size * size, 8),
        "audio_hidden_states": torch.randn(batch, audio, 6),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "audio_encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": timestep,
        "audio_timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[4], [7]])).long(),
        "audio_encoder_attention_mask": (torch.arange(7) < torch.tensor([[4], [7]])).long(),
        "num_frames": frames,
        "height": size,
        "width": size,
        "audio_num_frames": audio,
        "return_dict": False,
    }
    if newer:
        inputs["sigma"] = torch.full((batch,), 500.0)
        inputs["use_cross_timestep"] = True
    return sharpen(model), inputs


BUILDERS: dict[str, Builder] = {
    "ltx2": ltx2,
    "ltx2_3": lambda **kw: ltx2(newer=True, **kw),
}
