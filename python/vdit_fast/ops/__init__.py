"""Typed Python faces of the compiled operators, with their fake and autograd registrations."""

from .adaln import adaln_modulate, gate_residual, gate_residual_norm
from .attention import attention
from .block_mass import block_mass, score_lse, softmax_mass
from .block_mean import block_mean
from .cache import factor_update, forecast, forecast_gate_add, taylor_weights
from .clusters import counting_sort, kmeans, kmeans_assign, permute_tokens
from .compile_blocks import compile_blocks
from .gated_attention import gated_attention
from .merge import merge
from .pooled_attention import pooled_attention
from .qk_norm_rope import qk_norm_rope
from .select import select_top_k, select_top_p
from .short_attention import short_attention

__all__ = [
    "adaln_modulate",
    "attention",
    "block_mass",
    "block_mean",
    "compile_blocks",
    "counting_sort",
    "factor_update",
    "forecast",
    "forecast_gate_add",
    "gate_residual",
    "gate_residual_norm",
    "gated_attention",
    "kmeans",
    "kmeans_assign",
    "merge",
    "permute_tokens",
    "pooled_attention",
    "qk_norm_rope",
    "score_lse",
    "select_top_k",
    "select_top_p",
    "short_attention",
    "softmax_mass",
    "taylor_weights",
]
