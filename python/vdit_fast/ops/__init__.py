"""Typed Python faces of the compiled operators, with their fake and autograd registrations."""

from .adaln import adaln_modulate, gate_residual, gate_residual_norm
from .attention import attention
from .block_mass import block_mass, score_lse, softmax_mass
from .block_mean import block_mean
from .cache import factor_update, forecast, forecast_gate_add, taylor_weights
from .clusters import counting_sort, kmeans, kmeans_assign, permute_tokens
from .combine_rows import combine_rows
from .compile_blocks import compile_blocks
from .gated_attention import gated_attention
from .linear_attention import linear_attention, linear_attention_readout, linear_attention_state
from .merge import merge
from .pack import pack_slices, packed_sizes, unpack_slices
from .pooled_attention import pooled_attention
from .qk_norm_rope import qk_norm_rope
from .rows import gather_rows, scatter_rows
from .select import select_top_k, select_top_p
from .short_attention import short_attention

__all__ = [
    "adaln_modulate",
    "attention",
    "block_mass",
    "block_mean",
    "combine_rows",
    "compile_blocks",
    "counting_sort",
    "factor_update",
    "forecast",
    "forecast_gate_add",
    "gate_residual",
    "gate_residual_norm",
    "gated_attention",
    "gather_rows",
    "kmeans",
    "kmeans_assign",
    "linear_attention",
    "linear_attention_readout",
    "linear_attention_state",
    "merge",
    "pack_slices",
    "packed_sizes",
    "permute_tokens",
    "pooled_attention",
    "qk_norm_rope",
    "scatter_rows",
    "score_lse",
    "select_top_k",
    "select_top_p",
    "short_attention",
    "softmax_mass",
    "taylor_weights",
    "unpack_slices",
]
