"""Tiny HunyuanVideo-1.5 transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, from_diffusers, sharpen

__all__ = ["BUILDERS"]


def hunyuan15(*, layers: int = 2, image: bool = True) -> Built:
    torch.manual_seed(1)
    model = from_diffusers("HunyuanVideo15Transformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    batch = 2
    return sharpen(model), {
        "hidden_states": torch.randn(batch, 4, 3, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 9, 16) * 3,
        "encoder_attention_mask": (torch.arange(9) < torch.tensor([[5], [9]])).long(),
        "encoder_hidden_states_2": torch.randn(batch, 4, 8) * 3,
        "encoder_attention_mask_2": (torch.arange(4) < torch.tensor([[0], [3]])).long(),
        "image_embeds": torch.randn(batch, 3, 12) if image else torch.zeros(batch, 3, 12),
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"hunyuan_video15": hunyuan15}
