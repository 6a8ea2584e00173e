"""Tiny Mochi transformers."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def mochi(*, layers: int = 2, lengths: tuple[int, ...] = (5, 9)) -> Built:
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(1)
    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=layers, pooled_projection_dim=24,
        in_channels=4, text_embed_dim=16, time_embed_dim=16, max_sequence_length=9,
    )  # fmt: skip
    model.pos_frequencies.data.normal_()  # zeros before training, which would be no RoPE at all
    batch, text = len(lengths), 9
    return sharpen(model), {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.arange(text) < torch.tensor(lengths)[:, None],
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"mochi": mochi}
