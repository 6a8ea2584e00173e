"""Tiny SkyReels-V2 transformers."""

from __future__ import annotations

from typing import Any

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def skyreels(*, layers: int = 2, forcing: bool = False, frame_block: int = 1, image: bool = False,
             sample_info: bool = False) -> Built:  # fmt: skip
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(1)
    extra: dict[str, Any] = {"image_dim": 16, "added_kv_proj_dim": 32} if image else {}
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=layers, rope_max_seq_len=64, num_frame_per_block=frame_block,
        inject_sample_info=sample_info, **extra,
    )  # fmt: skip
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 4, 8, 8),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "return_dict": False,
    }
    if forcing:  # one timestep per frame; the first frame is a clean prefix
        inputs["timestep"] = torch.tensor([[0.0, 500.0, 500.0, 500.0]])
        inputs["enable_diffusion_forcing"] = True
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 257, 16)
    return sharpen(model), inputs


BUILDERS: dict[str, Builder] = {"skyreels_df": lambda **kw: skyreels(forcing=True, **kw)}
