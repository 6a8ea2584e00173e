"""Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape (arXiv 2505.22918)."""

from __future__ import annotations

import pytest
import torch
from planner_calls import call, dense_weights, draw, kind, layer

import vdit_fast
from vdit_fast.planners import Rettention

GRID = (3, 10, 13)


def measured(planner, ctx, q, k, v):
    """(rho, R) of a caching step."""
    return planner.measure(q, k, v, *vdit_fast.attention(q, k, v, return_lse=True), ctx)


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (11, False), (11, True)])
def test_rho_is_one_when_nothing_is_dropped(text, text_first):
    ctx = layer(GRID, text, text_first)
    rho, residual = measured(Rettention(window=1.0), ctx, *draw(ctx, 2, 16, 2))
    torch.testing.assert_close(rho, torch.ones_like(rho), atol=4e-6, rtol=0)
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=4e-6, rtol=0)


def test_equal_scores_make_rho_the_share_of_keys():
    """q = 0: all weights are 1/N, so rho = window / N, and rho * o is the sum of the window's values over N."""
    ctx, planner = layer(GRID, 11), Rettention(window=0.1)
    q, k, v = draw(ctx, 2, 16)
    q = torch.zeros_like(q)
    rho, residual = measured(planner, ctx, q, k, v)
    plan, n = planner.plan(q, k, ctx), ctx.num_tokens
    mask = plan.to_mask()[0, 0].float()
    torch.testing.assert_close(rho, (mask.sum(-1) / n).expand_as(rho), atol=1e-6, rtol=1e-5)
    scaled = vdit_fast.attention(q, k, v, plan, row_scale=rho)
    torch.testing.assert_close(scaled, torch.einsum("qk,bkhd->bqhd", mask, v) / n, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(residual, torch.einsum("qk,bkhd->bqhd", 1 - mask, v) / n, atol=1e-6, rtol=1e-5)


def test_rho_is_the_ratio_of_the_softmax_denominators():
    ctx, planner = layer(GRID), Rettention(window=0.2)
    q, k, v = draw(ctx, 2, 16, 2)
    rho, _ = measured(planner, ctx, q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    part = scores.exp() * planner.plan(q, k, ctx).to_mask()
    torch.testing.assert_close(rho.double(), part.sum(-1) / scores.exp().sum(-1), atol=1e-6, rtol=1e-5)


def test_scaled_output_uses_the_weights_of_dense_attention():
    """Plain sparse attention inflates every kept weight by 1 / rho; rho * o undoes exactly that."""
    ctx, planner = layer(GRID), Rettention(window=0.2)
    q, k, v = draw(ctx, 2, 16)
    rho, _ = measured(planner, ctx, q, k, v)
    plan = planner.plan(q, k, ctx)
    kept = dense_weights(q, k) * plan.to_mask()
    scaled = vdit_fast.attention(q, k, v, plan, row_scale=rho)
    want = torch.einsum("bhqk,bkhd->bqhd", kept, v.double())
    torch.testing.assert_close(scaled.double(), want, atol=1e-6, rtol=1e-5)
    bare = vdit_fast.attention(q, k, v, plan).double()
    torch.testing.assert_close(bare * rho.double().transpose(1, 2)[..., None], want, atol=1e-6, rtol=1e-5)


def test_papers_schedule_and_increment():
    """50 steps: 15 dense, 7 caching, 28 sparse with rho + 0.04 (m - 1)."""
    state, kinds, growth = {}, [], []
    for step in range(50):
        ctx = layer(GRID, step=step, state=state)
        found, _ = call(Rettention(), ctx, *draw(ctx, 1))
        kinds.append(kind(found))
        if kinds[-1] == "observed":
            (rho,) = [x.rho for key, x in state.items() if key[0] == "rettention"]
        elif kinds[-1] == "sparse":
            growth.append(round(float((found.row_scale - rho).mean()), 4))
    assert [kinds.count(word) for word in ("dense", "observed", "sparse")] == [15, 7, 28]
    assert growth == [0.0, 0.04, 0.08, 0.12] * 7


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (11, True)])
def test_steps_between_complete_the_window_with_what_was_remembered(text, text_first):
    """Inputs that stand still give dense attention at every step; values that move, only inside the window do."""
    state, planner = {}, Rettention(window=0.2, increment=0.0, dense_steps=0, interval=3)
    ctx = layer(GRID, text, text_first)
    q, k, v = draw(ctx, 2, 16, 2)
    dense = vdit_fast.attention(q, k, v)
    window = planner.plan(q, k, ctx)
    assert float((vdit_fast.attention(q, k, v, window) - dense).norm() / dense.norm()) > 0.3  # much lies outside
    for step in range(6):
        found, out = call(planner, layer(GRID, text, text_first, step=step, state=state), q, k, v)
        assert kind(found) == ("sparse" if step % 3 else "observed")
        torch.testing.assert_close(out, dense, atol=4e-6, rtol=1e-5)
        if step % 3:
            assert found.plan.density < 0.5
            moved = v + torch.randn_like(v)
            _, out = call(planner, layer(GRID, text, text_first, step=step, state=state), q, k, moved)
            mask, weights = window.to_mask(), dense_weights(q, k)
            want = torch.einsum("bhqk,bkhd->bqhd", weights * mask, moved.double())
            want += torch.einsum("bhqk,bkhd->bqhd", weights * ~mask, v.double())
            torch.testing.assert_close(out.double(), want, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("clamp", [False, True])
def test_rho_grows_by_the_increment(clamp):
    """The m-th step after a caching step returns (rho + 0.04 (m - 1)) O_w + R, with its own O_w."""
    state, planner = {}, Rettention(window=0.6, dense_steps=0, clamp=clamp)
    ctx = layer(GRID)
    q, k, v = draw(ctx, 2, 16)
    rho, residual = measured(planner, ctx, q, k, v)
    for step in range(5):
        new = draw(ctx, 2, 16) if step else (q, k, v)
        _, out = call(planner, layer(GRID, step=step, state=state), *new)
        if step:
            scale = rho + 0.04 * (step - 1)
            scale = scale.clamp(max=1) if clamp else scale
            part = vdit_fast.attention(*new, planner.plan(*new[:2], ctx))
            want = part * scale.transpose(1, 2)[..., None] + residual
            torch.testing.assert_close(out, want, atol=4e-6, rtol=1e-5)
