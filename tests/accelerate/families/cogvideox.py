"""Tiny CogVideoX transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def cogvideox(*, layers: int = 2, rope: bool = True, batch: int = 2) -> Built:
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=layers, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7, use_rotary_positional_embeddings=rope,
    )  # fmt: skip
    table = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3) if rope else None
    return sharpen(model), {
        "hidden_states": torch.randn(batch, 3, 4, 8, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "image_rotary_emb": table,
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {
    "cogvideox_5b": cogvideox,
    "cogvideox_2b": lambda **kw: cogvideox(rope=False, **kw),
}
