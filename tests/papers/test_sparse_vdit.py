"""Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers",
arXiv 2506.03065: every head has one of five static patterns, and all heads of a layer run in one launch."""

from __future__ import annotations

import math

import torch

import vdit_fast
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import SparseVDiT


def _context(layer: int, text: int = 7) -> LayerContext:
    grid = (6, 8, 10)
    return LayerContext(layer, 3, "a", grid, math.prod(grid), text, step=StepContext(step=0, num_steps=4))


def test_a_table_of_mixed_modes_in_one_launch_is_each_head_run_alone():
    torch.manual_seed(0)
    table = ["dmvsf", "mmdfs", "vvvmd"]
    stripes = {f"{layer}.{head}": f"{layer + head},7" for layer in range(3) for head in range(5)}
    planner = SparseVDiT(modes=table, stripes=stripes, block=32)
    for layer, row in enumerate(table):
        ctx = _context(layer)
        q, k, v = torch.randn(3, 2, ctx.num_tokens, 5, 16).unbind()
        mixed = vdit_fast.attention(q, k, v, planner.plan(q, k, ctx).validate())
        for head, letter in enumerate(row):
            x, place = [t[:, :, head : head + 1] for t in (q, k, v)], f"{layer}.{head}"
            one = SparseVDiT(modes=letter, stripes={f"{layer}.0": stripes[place]}, block=32)
            mask = one.plan(*x[:2], ctx).to_mask()
            scores = torch.einsum("bqhd,bkhd->bhqk", *(t.double() for t in x[:2])) / 4
            weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num(0)
            want = torch.einsum("bhqk,bkhd->bqhd", weights, x[2].double())
            torch.testing.assert_close(mixed[:, :, head : head + 1].double(), want, atol=3e-6, rtol=1e-5)


def test_all_full_is_dense():
    torch.manual_seed(0)
    ctx = _context(1)
    q, k, v = torch.randn(3, 2, ctx.num_tokens, 5, 16).unbind()
    for modes in ("full", "fffff", ["fffff"] * 3):
        planner = SparseVDiT(modes=modes)
        assert planner.decision(q, k, v, ctx).plan is None  # the very call that dense attention is
        assert torch.equal(vdit_fast.attention(q, k, v, planner.plan(q, k, ctx)), vdit_fast.attention(q, k, v))
