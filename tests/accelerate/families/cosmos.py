"""Tiny Cosmos transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def cosmos(*, layers: int = 2, per_frame: bool = False, image: bool = False) -> Built:
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(1)
    extra: dict[str, Any] = {"img_context_dim_in": 12, "img_context_dim_out": 32} if image else {}
    model = CosmosTransformer3DModel(
        in_channels=4 + per_frame, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        mlp_ratio=2.0, text_embed_dim=16, adaln_lora_dim=8, max_size=(8, 16, 16),
        concat_padding_mask=False,  # it takes torchvision
        extra_pos_embed_type=None if per_frame else "learnable", **extra,
    )  # fmt: skip
    if not per_frame:
        for table in model.learnable_pos_embed.parameters():  # zeros before training
            table.data.normal_()
    batch, frames = 2, 3
    timestep = torch.full((batch,), 500.0)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, frames, 8, 8),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "fps": 16,
        "return_dict": False,
    }
    if per_frame:  # video to world: the first frame is a condition and has no noise
        inputs["timestep"] = timestep.view(-1, 1, 1, 1, 1).repeat(1, 1, frames, 1, 1)
        inputs["timestep"][:, :, 0] = 0
        inputs["condition_mask"] = (inputs["timestep"] == 0).float().repeat(1, 1, 1, 8, 8)
    if image:
        inputs["encoder_hidden_states"] = (inputs["encoder_hidden_states"], torch.randn(batch, 5, 12))
        inputs["attention_mask"] = None
    return sharpen(model), inputs


BUILDERS: dict[str, Builder] = {
    "cosmos_1": cosmos,
    "cosmos_2": lambda **kw: cosmos(per_frame=True, **kw),
}
