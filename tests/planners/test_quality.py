"""What holds for every planner: determinism, and outputs nearer to dense attention as the density grows."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.planners import VSA, Draft, Radial, SlidingTile, Sparge, Window, XAttention
from vdit_fast.reference import attention

GRID = (6, 12, 12)
MAKERS = {
    "draft": lambda s: Draft(sparsity=s, pool=(3, 4)),
    "draft 3-D": lambda s: Draft(sparsity=s, pool=(3, 4), pool_t=2),
    "window": lambda s: Window(sparsity=s, tile=(1, 3, 3)),
    "spatial": lambda s: Window(sparsity=s, tile=(1, 3, 3), heads="spatial"),
    "temporal": lambda s: Window(sparsity=s, tile=(1, 3, 3), heads="temporal"),
    "radial": lambda s: Radial(decay=1 / s - 1 if s else 1e3, block=4, thinning=s > 0),
    "sliding_tile": lambda s: SlidingTile(sparsity=s, tile=(1, 3, 3)),
    "vsa": lambda s: VSA(sparsity=s, cube=(2, 3, 4)),
    "sparge": lambda s: Sparge(sparsity=s, block=(12, 12)),
    "xattention": lambda s: XAttention(top_p=1 - s, block=12, stride=4),
}


def error(q, k, v, plan, dense):
    return float((attention(q, k, v, plan) - dense).norm() / dense.norm())


@pytest.mark.parametrize("name", MAKERS)
def test_error_falls_as_density_grows(context, smooth, name):
    sparsities = (0.95, 0.65, 0.5, 0.3, 0.0)
    mean = torch.zeros(len(sparsities))
    for seed in range(3):
        q, k, v = smooth(GRID, 2, 16, 2.0, seed)
        dense = attention(q, k, v)
        for i, s in enumerate(sparsities):
            mean[i] += error(q, k, v, MAKERS[name](s).plan(q, k, context(GRID)), dense) / 3
    assert (mean.diff() < 0).all(), mean
    assert mean[-1] < 1e-5


def test_draft_beats_chance_and_windows_at_the_same_density(context, smooth):
    q, k, v = smooth(GRID, 2, 16, 2.0, 0)
    dense = attention(q, k, v)
    plan = MAKERS["draft"](0.75).plan(q, k, context(GRID))
    blind = MAKERS["draft"](0.75).plan(torch.randn_like(q), torch.randn_like(k), context(GRID))
    assert abs(blind.density - plan.density) < 0.02
    draft = error(q, k, v, plan, dense)
    assert draft < 0.5 * error(q, k, v, blind, dense)
    assert draft < error(q, k, v, MAKERS["window"](0.75).plan(q, k, context(GRID)), dense)


@pytest.mark.parametrize("name", MAKERS)
def test_same_inputs_same_plan(context, smooth, name):
    q, k, _ = smooth(GRID, 2, 16, 1.0, 0)
    ctx = context(GRID)
    first, cached, fresh = (MAKERS[name](0.75).plan(q, k, c) for c in (ctx, ctx, context(GRID)))
    for a, b, c in zip(first.op_args(), cached.op_args(), fresh.op_args(), strict=True):
        assert a is None or (torch.equal(a, b) and torch.equal(a, c))


@pytest.mark.parametrize("name", MAKERS)
def test_inputs_are_left_alone_and_need_no_gradient(context, name):
    q, k = torch.randn(2, 1, 6 * 12 * 12, 2, 16).unbind()
    before = q.clone(), k.clone()
    plan = MAKERS[name](0.75).plan(q.requires_grad_(), k.requires_grad_(), context(GRID))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert not any(t is not None and t.requires_grad for t in plan.op_args())
