"""Tiny Latte transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def latte(*, layers: int = 2, frames: int = 5, batch: int = 2, heads: int = 2, dim: int = 12) -> Built:
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(1)
    model = LatteTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=dim, in_channels=4, out_channels=4, num_layers=layers,
        cross_attention_dim=heads * dim, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=16, video_length=frames, attention_bias=True,
    )  # fmt: skip
    return sharpen(model), {
        "hidden_states": torch.randn(batch, 4, frames, 8, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"latte": latte}
