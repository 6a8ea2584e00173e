"""Sliding tiles: keys per tile, clamped windows, one window per head and layer, any grid."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import vdit_fast
from vdit_fast.plan import windows3d
from vdit_fast.planners import SlidingTile, from_dict
from vdit_fast.planners._windows import density
from vdit_fast.reference import attention


def random(ctx, heads=2, dim=8, batch=1):
    return torch.randn(2, batch, ctx.num_tokens, heads, dim).unbind()


def window_mask(planner, grid, window):
    """bool [n_video, n_video] by the paper's rule for odd windows: at most w // 2 tiles from the clamped centre."""
    axes = planner.axes(grid)
    edges = [[i for i, n in enumerate(pieces) for _ in range(n)] for pieces in axes]
    tile = torch.tensor(list(itertools.product(*edges)))
    mask = torch.ones(len(tile), len(tile), dtype=torch.bool)
    for axis, w in enumerate(window):
        n = len(axes[axis])
        if w == 0 or w >= n:
            continue
        centre = tile[:, axis].clamp(w // 2, n - 1 - w // 2)
        mask &= (tile[None, :, axis] - centre[:, None]).abs() <= w // 2
    return mask


@pytest.mark.parametrize(
    ("window", "tiles"),
    [((3, 3, 3), 27), ((5, 3, 3), 45), ((3, 3, 5), 45), ((1, 6, 10), 60), ((5, 6, 1), 30), ((5, 1, 10), 50)],
)
def test_every_tile_reads_equally_many(context, window, tiles):
    ctx = context((30, 48, 80))  # 5 × 6 × 10 tiles of 384 tokens
    q = torch.empty(1, ctx.num_tokens, 1, 1)
    plan = SlidingTile(window=window).plan(q, q, ctx)
    keys = torch.zeros(len(plan.tiles), dtype=torch.int64)
    owner = torch.searchsorted(plan.run_ptr[1:], torch.arange(len(plan.runs)), right=True)
    keys.index_add_(0, owner, plan.runs[:, 1].long())
    assert len(plan.tiles) == 300 and (keys == 384 * tiles).all()


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("grid", "tile", "window"),
    [
        ((5, 7, 9), (1, 2, 2), (3, 1, 3)),
        ((5, 7, 9), (2, 3, 4), (1, 3, 0)),
        ((6, 8, 8), (2, 2, 2), (3, 3, 3)),
        ((1, 6, 10), (6, 2, 2), (3, 1, 5)),
        ((9, 4, 5), (1, 8, 8), (5, 7, 9)),
    ],
)
def test_mask_is_the_clamped_window(context, text_first, grid, tile, window):
    planner, ctx = SlidingTile(window=window, tile=tile), context(grid, 5, text_first=text_first)
    want = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
    want[ctx.video_slice, ctx.video_slice] = window_mask(planner, grid, window)
    plan = planner.plan(*random(ctx), ctx).validate()
    assert plan.shape[:2] == (1, 1) and torch.equal(plan.to_mask()[0, 0], want)


def test_agrees_with_the_plan_builder(context):
    ctx = context((8, 12, 16), 3)
    plan = SlidingTile(window=(3, 1, 3), tile=(2, 4, 4)).plan(*random(ctx), ctx)
    assert torch.equal(plan.to_mask(), windows3d(ctx.grid, (6, 4, 12), tile=(2, 4, 4), text=3).to_mask())


def test_heads_and_layers_have_their_own_windows_in_one_plan(context):
    a, b, c = (3, 3, 1), (1, 0, 0), (0, 1, 3)
    table = ((a, b), (b, b), (c, a), (a, a))
    grid, tile = (5, 7, 9), (1, 2, 2)
    planner = from_dict(json.loads(json.dumps(SlidingTile(window=table, tile=tile).to_dict())))
    assert planner == SlidingTile(window=table, tile=tile)
    state: dict = {}
    for layer, windows in enumerate(table):
        ctx = context(grid, layer=layer, state=state)
        q, k, v = torch.randn(3, 1, ctx.num_tokens, 2, 16).unbind()
        plan = planner.plan(q, k, ctx).validate()
        want = torch.stack([window_mask(planner, grid, window) for window in windows])
        assert torch.equal(plan.to_mask()[0], want)
        torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), attention(q, k, v, plan), rtol=1e-4, atol=1e-5)
    per_head = SlidingTile(window=(a, b), tile=tile).plan(*random(context(grid)), context(grid))
    assert torch.equal(per_head.to_mask()[0, 1], window_mask(planner, grid, b))


def test_tables_must_fit_the_model(context):
    ctx = context((5, 7, 9))
    with pytest.raises(ValueError, match="3 heads but q has 2"):
        SlidingTile(window=((1, 1, 1),) * 3).plan(*random(ctx), ctx)
    with pytest.raises(ValueError, match="2 layers but the model has 4"):
        SlidingTile(window=(((1, 1, 1),) * 2,) * 2).plan(*random(ctx), ctx)


@pytest.mark.parametrize("grid", [(24, 16, 16), (21, 30, 52), (30, 48, 80), (5, 7, 9), (1, 45, 80), (33, 45, 80)])
def test_sparsity_picks_nested_odd_windows_of_about_that_density(context, grid):
    last, found = (0, 0, 0), []
    for sparsity in torch.linspace(0.99, 0, 34).tolist():
        planner = SlidingTile(sparsity=sparsity, tile=(4, 4, 4))
        axes = planner.axes(grid)
        (window,) = planner.windows(context(grid), 2)
        full = tuple(map(len, axes))
        assert all(w % 2 == 1 or w == n for w, n in zip(window, full, strict=True))
        assert all(w >= before for w, before in zip(window, last, strict=True))
        last = window
        found.append(density(axes, window))
    assert window == full and found[-1] == 1
    assert found == sorted(found)


def test_density_of_the_derived_window_is_the_plans(context):
    ctx = context((13, 14, 18))
    planner = SlidingTile(sparsity=0.8, tile=(3, 4, 4))
    (window,) = planner.windows(ctx, 2)
    assert planner.plan(*random(ctx), ctx).density == pytest.approx(density(planner.axes(ctx.grid), window))
