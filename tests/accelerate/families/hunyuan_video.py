"""Tiny HunyuanVideo transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def hunyuan(*, layers: int = 1, single: int = 1, lengths: tuple[int, ...] = (5, 9), **kw: Any) -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(1)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_single_layers=single, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), **kw,
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


def token_replace(**kw: Any) -> Built:
    """Image to video with the image as the first latent frame."""
    return hunyuan(image_condition_type="token_replace", **kw)


def framepack(*, layers: int = 1, single: int = 1, lengths: tuple[int, ...] = (5, 9)) -> Built:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    torch.manual_seed(1)
    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_single_layers=single, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=12,
        has_clean_x_embedder=True,
    )  # fmt: skip
    batch, text = len(lengths), 9
    inputs = {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 16) * 3,
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(lengths)[:, None]).long(),
        "pooled_projections": torch.randn(batch, 8),
        "image_embeds": torch.randn(batch, 3, 12),
        "indices_latents": torch.arange(9, 12),
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": torch.randn(batch, 4, 2, 8, 8),  # 32 tokens
        "indices_latents_clean": torch.tensor([0, 8]),
        "latents_history_2x": torch.randn(batch, 4, 2, 8, 8),  # 4
        "indices_latents_history_2x": torch.arange(6, 8),
        "latents_history_4x": torch.randn(batch, 4, 5, 8, 8),  # 2, the second one padded
        "indices_latents_history_4x": torch.arange(1, 6),
        "return_dict": False,
    }
    return sharpen(model), inputs


BUILDERS: dict[str, Builder] = {
    "hunyuan_framepack": framepack,
    "hunyuan_token_replace": token_replace,
    "hunyuan_video": hunyuan,
}
