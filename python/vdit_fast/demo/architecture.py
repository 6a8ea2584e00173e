"""What the demo model is: the arguments of diffusers' ``WanTransformer3DModel`` and the size of its clips."""

from __future__ import annotations

from typing import Any

from vdit_fast.demo.prompts import TEXT_DIM

FRAMES, HEIGHT, WIDTH = 24, 64, 64  # pixels; patch (1, 4, 4) makes 24 x 16 x 16 = 6,144 tokens
PATCH = (1, 4, 4)
SHIFT = 3.0  # flow-matching time shift, the same in training and sampling
SIGMA_FLOOR = 0.05  # v = (x_t - x_0) / max(sigma, floor)

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": PATCH,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
