"""Window planner: widths, ragged tiles, choice of heads, mixed plans."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.context import LayerContext, StepContext
from vdit_fast.plan import windows3d
from vdit_fast.planners import Window
from vdit_fast.planners._sampling import sample
from vdit_fast.planners._windows import band, density
from vdit_fast.planners.window import KINDS
from vdit_fast.reference import attention


def random(ctx, heads=2, dim=8, batch=1):
    return torch.randn(2, batch, ctx.num_tokens, heads, dim).unbind()


def labels(planner, grid):
    """Tile index of every video token along each axis, the slow way: int [n_video, 3]."""
    edges = [[i for i, n in enumerate(pieces) for _ in range(n)] for pieces in planner.axes(grid)]
    return torch.tensor(list(itertools.product(*edges)))


def window_mask(planner, grid, kind):
    """bool [n_video, n_video] from the definition: distance in tiles to a window start moved inside the grid."""
    label, mask = labels(planner, grid), True
    for axis, (pieces, w) in enumerate(zip(planner.axes(grid), planner.widths(grid)[kind], strict=True)):
        start = (label[:, axis] - w // 2).clamp(0, len(pieces) - w)[:, None]
        mask = mask & (label[None, :, axis] >= start) & (label[None, :, axis] < start + w)
    return mask


@pytest.mark.parametrize("heads", KINDS)
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("grid", "tile"), [((6, 8, 8), (2, 4, 4)), ((5, 7, 9), (2, 3, 4)), ((1, 6, 10), (2, 8, 4)), ((9, 4, 5), (4, 8, 8))]
)
def test_mask_is_the_window_plus_text_and_sinks(context, heads, text_first, grid, tile):
    planner = Window(heads=heads, tile=tile, sparsity=0.7, sinks=1)
    ctx = context(grid, 5, text_first=text_first)
    want = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
    video = window_mask(planner, grid, heads)
    early = planner.axes(grid)[0][0] * grid[1] * grid[2]  # a sink opens its whole tile
    video[:, :early] = True
    want[ctx.video_slice, ctx.video_slice] = video
    plan = planner.plan(*random(ctx), ctx).validate()
    assert plan.shape[:2] == (1, 1) and torch.equal(plan.to_mask()[0, 0], want)


def test_agrees_with_the_plan_builder(context):
    grid, tile = (8, 12, 16), (2, 4, 4)
    for kind, window in (("spatial", (6, 0, 0)), ("temporal", (0, 4, 8)), ("temporal", (3, 12, 5))):
        planner = Window(heads=kind, tile=tile, window_spatial=window, window_temporal=window)
        ctx = context(grid, 3)
        same = windows3d(grid, tuple(w or n for w, n in zip(window, grid, strict=True)), tile=tile, text=3)
        assert torch.equal(planner.plan(*random(ctx), ctx).to_mask(), same.to_mask())


@pytest.mark.parametrize("heads", KINDS)
def test_window_of_the_whole_grid_is_dense(context, heads):
    ctx = context((5, 7, 9), 3)
    for knobs in ({"sparsity": 0}, {"window_spatial": (99, 99, 99), "window_temporal": (0, 0, 0)}):
        assert Window(heads=heads, tile=(2, 3, 4), **knobs).plan(*random(ctx), ctx).density == 1


@pytest.mark.parametrize("grid", [(24, 16, 16), (21, 30, 52), (13, 30, 45), (5, 7, 9), (1, 45, 80), (33, 45, 80)])
def test_density_is_near_the_request_and_monotone(grid):
    share = {kind: [] for kind in KINDS}
    for sparsity in torch.linspace(0, 0.99, 34).tolist():
        planner = Window(sparsity=sparsity, tile=(1, 4, 4))
        axes = planner.axes(grid)
        for kind, width in planner.widths(grid).items():
            found = density(axes, width)
            share[kind].append(found)
            free = axes[:1] if kind == "spatial" else axes[1:]
            # the next window adds one piece on one axis, so the nearest is at most half such a step away
            least = math.prod(1 / len(a) for a in free)
            step = max(1 / len(a) for a in free)
            assert found - (1 - sparsity) <= max(least, 0.55 * step) + 1e-9
            assert (1 - sparsity) - found <= 0.55 * step + 1e-9
    for values in share.values():
        assert values == sorted(values, reverse=True) and values[0] == 1


def test_closed_formdensity(context):
    ctx = context((12, 16, 16))
    for sparsity, m, (my, mx) in ((0.75, 3, (2, 2)), (0.5, 6, (3, 3)), (0.9, 1, (2, 1))):
        planner = Window(sparsity=sparsity, tile=(1, 4, 4), heads=("spatial", "temporal"))
        assert planner.widths(ctx.grid) == {"spatial": (m, 4, 4), "temporal": (12, my, mx)}
        found = planner.plan(*random(ctx), ctx).density_per_head[0]
        torch.testing.assert_close(found, torch.tensor([m / 12, my * mx / 16]).double())


@given(tiles=st.integers(1, 12), width=st.integers(1, 12))
def test_bands_are_constant_and_nested(tiles, width):
    width = min(width, tiles)
    narrow = band(tiles, width)
    assert (narrow.sum(1) == width).all() and narrow.diagonal().all()
    assert (narrow <= band(tiles, min(width + 1, tiles))).all()


def test_one_run_per_spatial_tile_and_row_of_places(context):
    ctx = context((12, 16, 24))
    planner = Window(tile=(2, 4, 4), sparsity=0.7, heads=("spatial", "temporal"))
    plan = planner.plan(*random(ctx), ctx)
    runs = plan.run_ptr.diff()
    head = plan.tiles[:, 0]
    assert (runs[head == 0] == 1).all() and runs[head == 1].max() == planner.widths(ctx.grid)["temporal"][1]


def test_mixed_heads_equal_each_head_alone(context):
    ctx = context((4, 8, 8), 3)
    q, k, v = torch.randn(3, 2, ctx.num_tokens, 3, 8).unbind()
    words = ("temporal", "spatial", "temporal")
    mixed = attention(q, k, v, Window(heads=words, tile=(1, 4, 4)).plan(q, k, ctx).validate())
    for h, word in enumerate(words):
        x = [t[:, :, h : h + 1] for t in (q, k, v)]
        alone = attention(*x, Window(heads=word, tile=(1, 4, 4)).plan(*x[:2], ctx))
        torch.testing.assert_close(mixed[:, :, h : h + 1], alone)


def one_hot(grid, axis):
    """q or k that only look at tokens with the same frame (axis 0) or the same place (axis 1)."""
    frames, place = grid[0], grid[1] * grid[2]
    code = torch.arange(frames).repeat_interleave(place) if axis == 0 else torch.arange(place).repeat(frames)
    return torch.nn.functional.one_hot(code, max(frames, place))[None, :, None].float() * 30


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("text", [0, 6])
def test_heads_choose_their_kind(context, text, sinks):
    grid = (6, 4, 6)
    frame, place = one_hot(grid, 0), one_hot(grid, 1)
    video = torch.cat([frame, place, frame], 2)
    video = torch.cat([video, video.flip(2)[:, :, [1, 0, 1]]])  # the second item: place, frame, place
    words = torch.randn(2, text, 3, video.shape[3])
    ctx = context(grid, text, text_first=True)
    q = torch.cat([words, video], 1)
    planner = Window(tile=(1, 2, 2), sparsity=0.75, sinks=sinks)
    mass = planner.masses(q, q, ctx)
    assert (mass.amax(-1) > 0.9).all()
    mask = planner.plan(q, q, ctx).validate().to_mask()
    for b, kinds in enumerate(("sts", "tst")):
        for h, kind in enumerate(kinds):
            fixed = Window(tile=(1, 2, 2), sparsity=0.75, sinks=sinks, heads="spatial" if kind == "s" else "temporal")
            assert torch.equal(mask[b, h], fixed.plan(q, q, context(grid, text, text_first=True)).to_mask()[0, 0])


def test_masses_are_the_attention_inside_the_windows(context):
    ctx = context((4, 6, 5), 7, text_first=False, kv_len=torch.tensor([127, 123]))
    planner = Window(tile=(1, 2, 2), sparsity=0.6, rows=1000)  # more rows than tokens: all of them
    q, k = torch.randn(2, ctx.num_tokens, 4, 8), torch.randn(2, ctx.num_tokens, 2, 8)
    q[1, 123:] = k[1, 123:] = 50  # padding, never to be counted
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) / math.sqrt(8)
    scores[1, :, :, 123:] = -math.inf
    weights = torch.softmax(scores, -1)[:, :, :120, :120]
    want = [(weights * window_mask(planner, ctx.grid, kind)).sum(-1).mean(-1) for kind in KINDS]
    torch.testing.assert_close(planner.masses(q, k, ctx).double(), torch.stack(want, -1), atol=1e-6, rtol=1e-5)
    few = Window(tile=(1, 2, 2), sparsity=0.6, rows=64).masses(q, k, ctx)
    torch.testing.assert_close(few.double(), torch.stack(want, -1), atol=0.1, rtol=0)


def test_padding_rows_are_left_out_of_the_mean(context):
    ctx = context((4, 6, 5), kv_len=torch.tensor([120, 77]))
    planner = Window(tile=(1, 2, 2), sparsity=0.6, rows=1000)
    q, k = torch.randn(2, 2, 120, 4, 8).unbind()
    q[1, 77:] = math.nan
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k)[1:, :, :77, :77].double() / math.sqrt(8), -1)
    want = [(weights * window_mask(planner, ctx.grid, kind)[:77, :77]).sum(-1).mean(-1) for kind in KINDS]
    mass = planner.masses(q, k, ctx)
    torch.testing.assert_close(mass[1:].double(), torch.stack(want, -1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mass[:1], planner.masses(q[:1], k[:1], context((4, 6, 5))))


@pytest.mark.parametrize("grid", [(24, 16, 16), (21, 30, 52), (16, 8, 8)])
def test_samples_cover_rows_and_columns(grid):
    n = math.prod(grid)
    picked = sample(64, n, torch.device("cpu"))
    assert len(set(picked.tolist())) == 64 and picked.min() >= 0 and picked.max() < n
    assert len(set((picked % grid[2]).tolist())) > grid[2] * 0.6
    assert picked.sort().values.diff().max() < 3 * n / 64  # no large hole


def test_choice_is_kept_per_generation_layer_branch_and_refreshed(context):
    grid = (6, 4, 6)
    frame, place = one_hot(grid, 0), one_hot(grid, 1)
    fixed = [Window(heads=kind, tile=(1, 2, 2)) for kind in KINDS]
    spatial, temporal = (planner.plan(frame, frame, context(grid)).to_mask() for planner in fixed)
    state: dict = {}

    def mask(x, planner, step=0, layer=0, **where):
        ctx = context(grid, layer=layer, step=StepContext(step=step, **where), state=state)
        return planner.plan(x, x, ctx).to_mask()

    once = Window(tile=(1, 2, 2))
    assert torch.equal(mask(frame, once), spatial)
    assert torch.equal(mask(place, once, step=5), spatial)  # remembered
    assert torch.equal(mask(place, once, layer=1), temporal)
    assert torch.equal(mask(place, once, branch=1), temporal)
    assert torch.equal(mask(place, once, expert="transformer_2"), temporal)
    assert torch.equal(mask(place, once, generation=1), temporal)
    assert mask(place.expand(2, -1, -1, -1), once, generation=1).shape[0] == 2  # other batch: looks again
    again = Window(tile=(1, 2, 2), refresh=3)
    assert torch.equal(mask(frame, again, step=1), spatial)
    assert torch.equal(mask(place, again, step=3), spatial)
    assert torch.equal(mask(place, again, step=4), temporal)
    assert torch.equal(mask(frame, again, step=6), temporal)
    assert torch.equal(mask(frame, again, step=7), spatial)


def test_wrong_number_of_heads(context):
    ctx = context((2, 4, 4))
    with pytest.raises(ValueError, match="3 heads but q has 2"):
        Window(heads=("spatial",) * 3).plan(*random(ctx), ctx)


def test_half_inputs_choose_as_their_fp32_values(context):
    ctx = context((6, 8, 8))
    planner = Window(tile=(1, 2, 2))
    q, k = (x.bfloat16() for x in random(ctx, heads=4))
    assert torch.equal(planner.masses(q, k, ctx), planner.masses(q.float(), k.float(), ctx))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 7),
    sparsity=st.floats(0, 0.99),
    heads=st.sampled_from(["auto", "spatial", "temporal", ("temporal", "spatial")]),
)
def test_any_shape_gives_a_valid_plan_without_empty_rows(grid, tile, text, text_first, sinks, sparsity, heads):
    ctx = LayerContext(0, 1, "a", grid, math.prod(grid), text, text_first)
    plan = Window(tile=tile, sinks=sinks, sparsity=sparsity, heads=heads).plan(*random(ctx), ctx).validate()
    mask = plan.to_mask()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    assert mask[..., ctx.video_slice][..., : sinks * grid[1] * grid[2]].all()
