"""Tiny Allegro transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def rope(grid: tuple[int, int, int], head_dim: int) -> tuple[Any, Any]:
    """What the pipeline makes of a grid: tables per axis, and the tokens' positions."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        head_dim, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(tables), tuple(positions)


def allegro(*, layers: int = 2, mask: bool = False) -> Built:
    from diffusers import AllegroTransformer3DModel

    torch.manual_seed(1)
    model = AllegroTransformer3DModel(
        patch_size=2, patch_size_t=1, num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        num_layers=layers, cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=3,
        caption_channels=16,
    )  # fmt: skip
    for block in model.transformer_blocks:  # there is no norm of queries and keys to sharpen
        block.attn1.to_q.weight.data.mul_(3.0)
        block.attn1.to_k.weight.data.mul_(3.0)
    batch = 2
    inputs = {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[4], [7]])).long(),
        "image_rotary_emb": rope((3, 4, 4), 24),
        "return_dict": False,
    }
    if mask:
        inputs["attention_mask"] = torch.ones(batch, 3, 8, 8)
    return sharpen(model), inputs


BUILDERS: dict[str, Builder] = {
    "allegro": lambda **kw: allegro(mask=True, **kw),
}
