"""Readable pure-torch twins of the operators: oracle for tests and fallback."""

from .adaln import adaln_modulate, gate_residual, gate_residual_norm
from .attention import attention
from .block_mass import block_mass, score_lse, softmax_mass
from .block_mean import block_mean
from .cache import factor_update, forecast, forecast_gate_add
from .clusters import counting_sort, kmeans_assign, permute_tokens
from .combine_rows import combine_rows
from .linear_attention import linear_attention, linear_attention_readout, linear_attention_state
from .merge import merge
from .pack import pack_slices, unpack_slices
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
    "counting_sort",
    "factor_update",
    "forecast",
    "forecast_gate_add",
    "gate_residual",
    "gate_residual_norm",
    "gather_rows",
    "kmeans_assign",
    "linear_attention",
    "linear_attention_readout",
    "linear_attention_state",
    "merge",
    "pack_slices",
    "permute_tokens",
    "qk_norm_rope",
    "scatter_rows",
    "score_lse",
    "select_top_k",
    "select_top_p",
    "short_attention",
    "softmax_mass",
    "unpack_slices",
]
