"""Tiny Sana-Video and Sana transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, from_diffusers, sharpen

__all__ = ["BUILDERS"]

SIZES: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "caption_channels": 16, "mlp_ratio": 2.0,
}  # fmt: skip


def text(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[4], [7]])[:batch]).long(),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


def sana_video(*, layers: int = 2, norm: str | None = "rms_norm_across_heads") -> Built:
    torch.manual_seed(1)
    model = from_diffusers("SanaVideoTransformer3DModel")(
        **SIZES, num_layers=layers, qk_norm=norm, rope_max_seq_len=64, patch_size=(1, 2, 2)
    )
    return sharpen(model), {"hidden_states": torch.randn(2, 4, 3, 8, 8), **text(2)}


def sana(*, layers: int = 2, norm: str | None = "rms_norm_across_heads") -> Built:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(1)
    model = SanaTransformer2DModel(**SIZES, num_layers=layers, qk_norm=norm, sample_size=8, patch_size=1)
    return sharpen(model), {"hidden_states": torch.randn(2, 4, 8, 12), **text(2)}


BUILDERS: dict[str, Builder] = {"sana_video": sana_video, "sana": sana}
