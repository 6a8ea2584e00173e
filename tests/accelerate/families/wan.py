"""Tiny Wan transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def wan(
    *, layers: int = 2, image: bool = False, per_token: bool = False, batch: int = 1, frames: int = 3, size: int = 8
) -> Built:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    extra: dict[str, Any] = {"image_dim": 16, "added_kv_proj_dim": 32} if image else {}
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=layers, rope_max_seq_len=64, **extra,
    )  # fmt: skip
    tokens = frames * (size // 2) ** 2
    timestep = torch.full((batch,), 500.0)
    if per_token:  # the first frame is a condition and has no noise
        timestep = torch.full((batch, tokens), 500.0)
        timestep[:, : tokens // frames] = 0
    inputs = {
        "hidden_states": torch.randn(batch, 4, frames, size, size),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 512, 16),
        "return_dict": False,
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 257, 16)
    return sharpen(model), inputs


BUILDERS: dict[str, Builder] = {
    "wan_t2v": wan,
    "wan_i2v": lambda **kw: wan(image=True, **kw),
    "wan_ti2v": lambda **kw: wan(per_token=True, **kw),
}
