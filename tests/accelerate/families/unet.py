"""Tiny video UNets: Stable Video Diffusion and AnimateDiff."""

from __future__ import annotations

import torch

from families.base import Builder, Built, sharpen

__all__ = ["BUILDERS"]


def svd(*, layers: int = 1, frames: int = 5, batch: int = 2) -> Built:
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(1)
    model = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 32), addition_time_embed_dim=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=24, layers_per_block=layers, cross_attention_dim=16,
        num_attention_heads=(2, 2), num_frames=frames,
    )  # fmt: skip
    return sharpen(model), {
        "sample": torch.randn(batch, frames, 8, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(batch, 1, 16),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
        "return_dict": False,
    }


def animatediff(*, layers: int = 1, frames: int = 4, batch: int = 2) -> Built:
    from diffusers import UNetMotionModel

    torch.manual_seed(1)
    model = UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=layers,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=16, num_attention_heads=2,
        norm_num_groups=8, motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip
    return sharpen(model), {
        "sample": torch.randn(batch, 4, frames, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 16).repeat_interleave(frames, 0),  # as the pipeline does
        "return_dict": False,
    }


BUILDERS: dict[str, Builder] = {"svd": svd, "animatediff": animatediff}
