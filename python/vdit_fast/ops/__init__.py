"""Typed Python faces of the compiled operators, with their fake and autograd registrations."""

from .attention import attention
from .block_mass import block_mass, score_lse, softmax_mass
from .block_mean import block_mean
from .clusters import counting_sort, kmeans, kmeans_assign, permute_tokens
from .compile_blocks import compile_blocks
from .merge import merge
from .select import select_top_k, select_top_p

__all__ = [
    "attention",
    "block_mass",
    "block_mean",
    "compile_blocks",
    "counting_sort",
    "kmeans",
    "kmeans_assign",
    "merge",
    "permute_tokens",
    "score_lse",
    "select_top_k",
    "select_top_p",
    "softmax_mass",
]
