"""Makes video diffusion transformers fast: sparse attention plans, their kernels, and one call that plugs them in."""

from __future__ import annotations

from ._load import load as _load

_info = _load()

# The operators must be loaded before the modules that register fakes and gradients for them.
from . import reference  # noqa: E402
from .accelerate import NothingServed, accelerate  # noqa: E402
from .config import Config  # noqa: E402
from .interception import patch_sdpa  # noqa: E402
from .ops import (  # noqa: E402
    adaln_modulate,
    attention,
    gate_residual,
    gate_residual_norm,
    linear_attention,
    merge,
    qk_norm_rope,
    short_attention,
)
from .plan import AttentionPlan  # noqa: E402
from .planners import Draft, Window  # noqa: E402
from .stream import stream  # noqa: E402

build_info = _info.build_info

__all__ = [
    "AttentionPlan",
    "Config",
    "Draft",
    "NothingServed",
    "Window",
    "accelerate",
    "adaln_modulate",
    "attention",
    "build_info",
    "gate_residual",
    "gate_residual_norm",
    "linear_attention",
    "merge",
    "patch_sdpa",
    "qk_norm_rope",
    "reference",
    "short_attention",
    "stream",
]
