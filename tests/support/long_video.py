"""A tiny Wan transformer, a scheduler and a prompt for pipelines of frame blocks."""

from __future__ import annotations

from typing import Any

import torch

SHAPE = (4, 8, 8)  # channels, height, width of a latent frame; 16 tokens
CHANNELS = 32


def tiny_wan(layers: int = 4, seed: int = 1) -> Any:
    """Random weights of a size that makes attention sharp enough to see a wrong key."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=layers, rope_max_seq_len=64,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4 if ".attn1.to_" in name else 0.1)
    return model.eval().requires_grad_(False)


def euler(steps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def unipc(steps: int) -> Any:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def prompt(rows: int = 2) -> dict[str, Any]:
    """The constant argument of the transformer: [conditional, unconditional]."""
    return {"encoder_hidden_states": torch.randn(rows, 7, 16, generator=torch.Generator().manual_seed(3))}
