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


def consisid(*, layers: int = 2) -> Built:
    from diffusers import ConsisIDTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    torch.manual_seed(1)
    model = ConsisIDTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=layers, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        max_text_seq_length=7, use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_dim_head=8,
        cross_attn_num_heads=2, LFE_id_dim=12, LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2,
        LFE_num_id_token=2, LFE_num_querie=3, LFE_output_dim=32, LFE_ff_mult=1, LFE_num_scale=2,
    )  # fmt: skip
    return sharpen(model), {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3),
        "id_cond": torch.randn(2, 12),
        "id_vit_hidden": [torch.randn(2, 5, 16) for _ in range(2)],
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {
    "cogvideox_5b": cogvideox,
    "cogvideox_2b": lambda **kw: cogvideox(rope=False, **kw),
    "consisid": consisid,
}
