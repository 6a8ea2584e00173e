"""Tiny Wan transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, from_diffusers, sharpen

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


def vace(*, layers: int = 1) -> Built:
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(1)
    model = WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=layers, rope_max_seq_len=64, vace_layers=[0], vace_in_channels=6,
    )  # fmt: skip
    return sharpen(model), {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "control_hidden_states": torch.randn(1, 6, 3, 8, 8),
        "control_hidden_states_scale": torch.tensor([0.7]),
        "return_dict": False,
    }


def animate(*, layers: int = 2) -> Built:
    torch.manual_seed(1)
    model = from_diffusers("WanAnimateTransformer3DModel")(
        num_attention_heads=2, attention_head_dim=16, in_channels=12, latent_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=48, num_layers=layers, rope_max_seq_len=64, image_dim=16, added_kv_proj_dim=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    return sharpen(model), {
        "hidden_states": torch.randn(1, 12, 3, 8, 8),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 257, 16),
        "pose_hidden_states": torch.randn(1, 4, 2, 8, 8),
        "face_pixel_values": torch.randn(1, 3, 5, 16, 16),
        "return_dict": False,
    }


def chronoedit(*, layers: int = 2) -> Built:
    torch.manual_seed(1)
    model = from_diffusers("ChronoEditTransformer3DModel")(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=layers, rope_max_seq_len=64, image_dim=16, added_kv_proj_dim=32,
    )  # fmt: skip
    return sharpen(model), {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 257, 16),
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {
    "wan_animate": animate,
    "wan_t2v": wan,
    "wan_i2v": lambda **kw: wan(image=True, **kw),
    "wan_ti2v": lambda **kw: wan(per_token=True, **kw),
    "wan_vace": vace,
}
