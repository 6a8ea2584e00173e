"""Attention with stand-ins: the read tokens and the means of the others are two calls, merged by their LSE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.plan.stand_ins import NEVER

from .merge import merge

if TYPE_CHECKING:
    from vdit_fast.plan.stand_ins import StandIns

LARGEST = 6e4  # of fp16
_EXTRA = 8  # further head dimensions that carry the weights; keeps rows a multiple of 16 bytes


def add_stand_ins(
    out: Tensor,
    lse: Tensor,
    attend: Callable[..., Any],
    stand_ins: StandIns,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of the tokens that are read, completed by the stand-ins of those that are not.

    A score is a product of rows, so a constant of each key is one more dimension of both: q gets c and k gets
    log n / (scale · c). c is a power of two, and the number is split into a rounded part and its rest, so that 16-bit
    inputs carry it too.

    Raises:
        ValueError: scale is 0, or there is no room for the further dimensions.
    """
    dim = q.shape[-1]
    if scale == 0:
        raise ValueError("scale is 0, which leaves no way to weight stand-ins; use a plan without them")
    if dim + _EXTRA > 256:
        raise ValueError(f"head dim is {dim}; with stand-ins at most {256 - _EXTRA} are supported")
    keys, values, weight = stand_ins.means(k, v, kv_len)
    factor = 2.0 ** min(round(-math.log2(abs(scale))), 14)  # within fp16
    exact = (weight / (scale * factor)).transpose(1, 2)[..., None].clamp(-LARGEST, LARGEST)
    high = exact.to(q.dtype)
    low = (exact - high.to(exact.dtype)).to(q.dtype)
    ones = q.new_full((1, 1, 1, 2), factor)
    wide_q = torch.cat([q, torch.nn.functional.pad(ones, (0, _EXTRA - 2)).expand(*q.shape[:3], _EXTRA)], -1)
    wide_k = torch.cat([keys.to(q.dtype), high, low], -1)
    wide_k = torch.nn.functional.pad(wide_k, (0, _EXTRA - 2))
    wide_v = torch.nn.functional.pad(values.to(q.dtype), (0, _EXTRA))
    rest, rest_lse = attend(wide_q, wide_k, wide_v, stand_ins.plan, scale=scale, return_lse=True)
    nothing = rest_lse < NEVER / 2  # only stand-ins of blocks without tokens: an empty row stays one
    return merge([out, rest[..., :dim]], [lse, rest_lse.masked_fill(nothing, -torch.inf)])
