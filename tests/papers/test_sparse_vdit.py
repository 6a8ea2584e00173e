"""Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers",
arXiv 2506.03065: every head has one of five static patterns, and all heads of a layer run in one launch."""

from __future__ import annotations

import math

import pytest
import torch

import vdit_fast
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import SparseVDiT
from vdit_fast.tune.search import Search

STRIPES = (1, 4, 5)


def _context(layer: int, text: int = 7) -> LayerContext:
    grid = (6, 8, 10)
    return LayerContext(layer, 3, "a", grid, math.prod(grid), text, step=StepContext(step=0, num_steps=4))


def _reads(mode: str, i: int, j: int, ctx: LayerContext, sparsity: float, block: int, sinks: int) -> bool:
    """Whether token i of the joint sequence reads token j, from the definition, one pair at a time."""
    (frames, height, width), text = ctx.grid, ctx.text
    n, fs = frames * height * width, height * width
    i, j = (x - text if ctx.text_first else x for x in (i, j))
    if mode in "sf" or not (0 <= i < n and 0 <= j < n) or j < sinks * fs:  # text reads all, all read text and sinks
        return mode != "s"
    if mode == "v":
        return (j - sinks * fs) // block in STRIPES
    place = {"d": lambda t, at, count: t * fs + at, "m": lambda t, at, count: at * count + t}[mode]
    a, b = place(i // fs, i % fs, frames), place(j // fs - sinks, j % fs, frames - sinks)  # keys without the sinks
    lo_a, lo_b = a - a % block, b - b % block
    hi_a, hi_b = min(lo_a + block, n), min(lo_b + block, n - sinks * fs)
    if mode == "d":
        lo_b, hi_b = lo_b + sinks * fs, hi_b + sinks * fs
    else:  # of every place, the keys have frames - sinks tokens where the queries have frames
        lo_b, hi_b = lo_b * frames / (frames - sinks), hi_b * frames / (frames - sinks)
    total = n + text
    reach = total * (1 - math.sqrt(sparsity + 2 * text / total))
    return abs(lo_a + hi_a - lo_b - hi_b) / 2 <= reach + 1e-9 or (lo_a < hi_b and lo_b < hi_a)


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("sinks", [0, 1])
def test_what_each_mode_reads(text, text_first, sinks):
    grid, block, sparsity = (4, 3, 5), 6, 0.6
    ctx = LayerContext(0, 1, "a", grid, 60, text, text_first, step=StepContext(step=0, num_steps=4))
    stripes = {"0.3": ",".join(map(str, STRIPES))}
    planner = SparseVDiT(modes="dmsvf", stripes=stripes, block=block, sparsity=sparsity, sinks=sinks)
    q, k = torch.randn(2, 1, 60 + text, 5, 8).unbind()
    found = planner.plan(q, k, ctx).validate().to_mask()[0]
    for head, mode in enumerate("dmsvf"):
        pairs = [[_reads(mode, i, j, ctx, sparsity, block, sinks) for j in range(60 + text)] for i in range(60 + text)]
        assert torch.equal(found[head], torch.tensor(pairs)), mode
    density = found.double().mean((1, 2))
    assert (density[[0, 1, 3]] < 0.75).all() and density[2] == 0 and density[4] == 1
    assert not torch.equal(found[0], found[1])


def test_the_search_finds_the_pattern_of_a_head():
    """Banded attention takes the diagonal; the same tokens moved to token-major order take the multi-diagonal; no
    values, skip; and attention to everything stays full."""
    torch.manual_seed(0)
    frames, height, width = grid = (8, 4, 6)
    fs, n = height * width, frames * height * width
    code = torch.nn.functional.one_hot(torch.arange(n) // fs, 16).float() * 8  # a frame's code, large
    q, k, v = torch.randn(3, 1, n, 4, 16).unbind()
    q[0, :, 0] = k[0, :, 0] = code
    position = torch.arange(n)
    moved = position % frames * fs + position // frames  # where the tokens of a token-major sequence live
    for x in (q, k, v):
        x[:, moved, 1] = x[:, :, 0]
    v[:, :, 2] = 0
    q[:, :, 3] *= 0.01
    search = Search(
        base=SparseVDiT(sparsity=0.6, block=16, sinks=0), modes=("skip", "diagonal", "multi_diagonal"), price=0.01,
        max_loss=0.2, timed=False,
    )  # fmt: skip
    ctx = LayerContext(0, 1, "a", grid, n, step=StepContext(step=0, num_steps=4), family="wan")
    plan = search.decision(q, k, v, ctx).plan
    assert search.row((0, 0)) == "dmsf"
    for mode in ("diagonal", "multi_diagonal"):
        assert 0.3 < search.densities[mode] < 0.5
    dense = vdit_fast.attention(q, k, v)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), dense, atol=2e-3, rtol=1e-3)
    tuned = search.found({}, {})
    assert torch.equal(tuned.plan(q, k, ctx).to_mask(), plan.to_mask())


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
