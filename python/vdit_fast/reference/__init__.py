"""Readable pure-torch twins of the operators: oracle for tests and fallback."""

from .attention import attention
from .block_mass import block_mass, score_lse, softmax_mass
from .block_mean import block_mean
from .clusters import counting_sort, kmeans_assign, permute_tokens
from .merge import merge
from .select import select_top_k, select_top_p

__all__ = [
    "attention",
    "block_mass",
    "block_mean",
    "counting_sort",
    "kmeans_assign",
    "merge",
    "permute_tokens",
    "score_lse",
    "select_top_k",
    "select_top_p",
    "softmax_mass",
]
