"""Tiny LTX-Video transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def ltx_video(*, layers: int = 2) -> Built:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(1)
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=layers, caption_channels=16,
    )  # fmt: skip
    return sharpen(model), {
        "hidden_states": torch.randn(1, 3 * 4 * 4, 8),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 7),
        "num_frames": 3,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"ltx_video": ltx_video}
