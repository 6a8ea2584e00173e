"""Tiny EasyAnimate transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def easyanimate(*, layers: int = 2, mmdit_layers: int | None = None) -> Built:
    from diffusers import EasyAnimateTransformer3DModel

    torch.manual_seed(1)
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        num_layers=layers, mmdit_layers=layers // 2 if mmdit_layers is None else mmdit_layers, time_embed_dim=16,
        text_embed_dim=16, text_embed_dim_t5=12, norm_eps=1e-5,
    )  # fmt: skip
    batch = 2
    return sharpen(model), {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 4, 16),
        "encoder_hidden_states_t5": torch.randn(batch, 3, 12),
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"easyanimate": easyanimate}
