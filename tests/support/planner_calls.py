"""What tests of planners share: a context, and one attention call as a session makes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import vdit_fast
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import Decision, Planner

ODD_GRIDS = [(5, 7, 9), (3, 15, 13), (1, 11, 10), (2, 1, 37)]
TEXTS = [(0, False), (13, False), (13, True)]


def layer(
    grid: tuple[int, int, int],
    text: int = 0,
    text_first: bool = False,
    *,
    step: int = 0,
    num_steps: int | None = 50,
    kv_len: Tensor | None = None,
    state: dict[Any, Any] | None = None,
    index: int = 0,
    layers: int = 4,
    **where: Any,
) -> LayerContext:
    """A context; `where` goes into its StepContext. `state` is its static memory, too: geometry must not mix either."""
    place = StepContext(step=step, num_steps=num_steps, **where)
    kept = {} if state is None else state
    return LayerContext(index, layers, "a", grid, math.prod(grid), text, text_first, kv_len, place, kept, static=kept)


def draw(ctx: LayerContext, heads: int = 2, dim: int = 16, batch: int = 1, kv_heads: int | None = None) -> list[Tensor]:
    """Random q, k, v of the context's joint sequence."""
    return [torch.randn(batch, ctx.num_tokens, n, dim) for n in (heads, kv_heads or heads, kv_heads or heads)]


def call(planner: Planner, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> tuple[Decision, Tensor]:
    """The planner's decision and the call's output."""
    found = planner.decision(q.detach(), k.detach(), v.detach(), ctx)
    out, lse = vdit_fast.attention(q, k, v, found.plan, row_scale=found.row_scale, kv_len=ctx.kv_len, return_lse=True)
    if found.observe is not None:
        found.observe(out.detach(), lse.detach())
    return found, out if found.residual is None else out + found.residual


def kind(found: Decision) -> str:
    """ "dense", "observed" (dense, and looked at) or "sparse"."""
    return "sparse" if found.plan is not None else "dense" if found.observe is None else "observed"


def dense_weights(q: Tensor, k: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Exact attention weights, fp64 [B, H, N, N]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    if kv_len is not None:
        padding = torch.arange(k.shape[1]) >= kv_len.view(-1, 1, 1, 1)
        scores = scores.masked_fill(padding, -math.inf)
    return scores.softmax(-1)


def plans_equal(a: Any, b: Any) -> bool:
    """Whether two plans hold the same bits."""
    pairs = zip(a.op_args(), b.op_args(), strict=True)
    return a.shape == b.shape and all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)
