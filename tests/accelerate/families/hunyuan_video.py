"""Tiny HunyuanVideo transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def hunyuan(*, layers: int = 1, single: int = 1, lengths: tuple[int, ...] = (5, 9)) -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(1)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_single_layers=single, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    batch, text = len(lengths), 9
    mask = (torch.arange(text) < torch.tensor(lengths)[:, None]).long()
    return sharpen(model), {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 16) * 3,
        "pooled_projections": torch.randn(batch, 8),
        "encoder_attention_mask": mask,
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"hunyuan_video": hunyuan}
