"""Tiny Lumina-Next transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def lumina_next(*, layers: int = 2, base: int | None = 16, kv_heads: int = 2) -> Built:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    torch.manual_seed(1)
    model = LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=64, num_layers=layers, num_attention_heads=4,
        num_kv_heads=kv_heads, multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    for layer in model.layers:
        layer.gate.data.normal_()  # zero in a new model: no text would come in
    model.pad_token.data.normal_()
    return sharpen(model), {
        "hidden_states": torch.randn(2, 4, 12, 16),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_mask": (torch.arange(7) < torch.tensor([[4], [7]])).long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {} if base is None else {"base_sequence_length": base},
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"lumina_next": lumina_next}
