"""Sparse VideoGen: band widths, masks of both kinds, choice of heads by the error of sampled rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vdit_fast
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import SVG1, from_dict
from vdit_fast.planners._tokens import cut
from vdit_fast.planners.svg1 import KINDS, MODELS
from vdit_fast.reference import attention

LAYOUTS = [(0, False), (5, False), (5, True)]


def random(ctx, heads=2, dim=8, batch=1, kv_heads=None):
    q = torch.randn(batch, ctx.num_tokens, heads, dim)
    return q, *torch.randn(2, batch, ctx.num_tokens, kv_heads or heads, dim).unbind()


def fixed(planner, ctx, kind):
    """bool [N, N], the mask of one kind, through a plan."""
    return planner._build(torch.tensor([[kind == "temporal"]]), ctx).validate().to_mask()[0, 0]


def band_mask(planner, ctx, kind):
    """The same from the definition, one token pair after the other in blocks of positions."""
    frames, height, width = ctx.grid
    frame, n = height * width, ctx.n_video
    token = torch.arange(n)
    position = token if kind == "spatial" else token % frame * frames + token // frame
    late = token // frame >= planner.sinks
    reach = planner.width(ctx) * frame
    rows = [sorted(position.tolist())[i : i + m] for i, m in pieces(n, planner.block)]
    keys = sorted(position[late].tolist())
    columns = [keys[i : i + m] for i, m in pieces(len(keys), planner.block)]
    video = torch.zeros(n, n, dtype=torch.bool)
    at = position.argsort()
    for row in rows:
        for column in columns:
            away = abs((row[0] + row[-1]) / 2 - (column[0] + column[-1]) / 2)
            if away <= reach or (row[0] <= column[-1] and column[0] <= row[-1]):
                video[at[row][:, None], at[column]] = True
    video[:, ~late] = True
    mask = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
    mask[ctx.video_slice, ctx.video_slice] = video
    return mask


def pieces(n, size):
    lengths = cut(n, size) if n else ()
    return [(sum(lengths[:i]), m) for i, m in enumerate(lengths)]


@pytest.mark.parametrize(
    ("grid", "text", "density", "frames"),
    [
        ((21, 45, 80), 0, 0.25, 2.8135),
        ((21, 45, 80), 0, 0.30, 3.4301),
        ((33, 45, 80), 256, 0.25, 4.3487),
        ((33, 45, 80), 256, 0.20, 3.4120),
        ((11, 48, 85), 226, 0.25, 1.4174),
    ],
)
def test_published_widths(context, grid, text, density, frames):
    assert SVG1(sparsity=1 - density).width(context(grid, text)) == pytest.approx(frames, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
@pytest.mark.parametrize(("grid", "block"), [((5, 7, 9), 16), ((6, 4, 8), 32), ((3, 2, 5), 128), ((1, 6, 7), 10)])
def test_mask_is_the_band_plus_text_and_sinks(context, kind, sinks, text, text_first, grid, block):
    ctx = context(grid, text, text_first=text_first)
    planner = SVG1(sparsity=0.7, sinks=sinks, block=block)
    assert torch.equal(fixed(planner, ctx, kind), band_mask(planner, ctx, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [0, 1, 2, 5])
@pytest.mark.parametrize("block", [1, 16, 29, 400])
def test_every_token_reads_itself(context, kind, sinks, block):
    for text, text_first in LAYOUTS:
        planner = SVG1(sparsity=0.99, block=block, sinks=sinks)
        assert fixed(planner, context((5, 7, 9), text, text_first=text_first), kind).diagonal().all()


def test_temporal_band_is_the_spatial_one_of_the_transposed_clip(context):
    """Token-major order: place by place, all frames of a place in a row (position = place * F + frame)."""
    grid = (6, 4, 8)
    planner = SVG1(sparsity=0.75, sinks=0, block=8)
    order = torch.arange(192).view(6, 32).T.flatten()
    temporal = fixed(planner, context(grid), "temporal")[order][:, order]
    distance = (torch.arange(192)[:, None] - torch.arange(192)).abs()
    reach = planner.width(context(grid)) * 32
    assert (temporal >= (distance <= reach - 7)).all() and (temporal <= (distance <= reach + 7)).all()
    assert torch.equal(temporal, fixed(planner, context(grid), "spatial"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
def test_whole_budget_is_dense(context, kind, text, text_first):
    ctx = context((5, 7, 9), text, text_first=text_first)
    for knobs in ({"sparsity": 0}, {"sinks": 5}, {"sinks": 9}):
        planner = SVG1(block=16, **knobs)
        assert fixed(planner, ctx, kind).all()
        q, k, v = random(ctx)
        torch.testing.assert_close(attention(q, k, v, planner.decision(q, k, v, ctx).plan), attention(q, k, v))


@pytest.mark.parametrize(("grid", "text"), [((24, 16, 16), 0), ((21, 30, 52), 0), ((13, 30, 45), 226)])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_density_is_the_one_asked_for(context, grid, text, density):
    ctx = context(grid, text, text_first=True)
    planner = SVG1(sparsity=1 - density, sinks=0)
    for kind in KINDS:
        plan = planner._build(torch.tensor([[kind == "temporal"]]), ctx)
        n = ctx.num_tokens
        assert abs(plan.density - density) < 128 / n + (text / n) ** 2 + 0.002
        assert plan.run_ptr.diff().max() <= 1 + (text > 0)


def one_hot(grid, axis):
    """q or k that only look at tokens with the same frame (axis 0) or the same place (axis 1)."""
    frames, place = grid[0], grid[1] * grid[2]
    code = torch.arange(frames).repeat_interleave(place) if axis == 0 else torch.arange(place).repeat(frames)
    return torch.nn.functional.one_hot(code, max(frames, place))[None, :, None].float() * 30


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
def test_heads_choose_their_kind(context, text, text_first, sinks):
    grid = (6, 4, 6)
    frame, place = one_hot(grid, 0), one_hot(grid, 1)
    video = torch.cat([frame, place, frame], 2)
    video = torch.cat([video, video.flip(2)[:, :, [1, 0, 1]]])  # the second item: place, frame, place
    words = torch.randn(2, text, 3, video.shape[3])
    ctx = context(grid, text, text_first=text_first)
    q = torch.cat([words, video] if text_first else [video, words], 1)
    v = torch.randn_like(q)
    planner = SVG1(sparsity=0.75, sinks=sinks, block=6)
    mask = planner.decision(q, q, v, ctx).plan.validate().to_mask()
    for b, kinds in enumerate(("sts", "tst")):
        for h, kind in enumerate(kinds):
            assert torch.equal(mask[b, h], fixed(planner, ctx, "spatial" if kind == "s" else "temporal"))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
def test_errors_are_those_of_the_masks(context, text, text_first, kv_heads):
    ctx = context((4, 6, 5), text, text_first=text_first)
    ctx.kv_len = torch.tensor([ctx.num_tokens, ctx.num_tokens - 15])
    q, k, v = random(ctx, heads=4, batch=2, kv_heads=kv_heads)
    real = (torch.arange(ctx.num_tokens) < ctx.kv_len[:, None])[..., None, None]
    planner = SVG1(sparsity=0.6, block=10, rows=1000)  # more rows than tokens: all of them
    x = [t.double() for t in (q, k, v)]
    dense = attention(*x, kv_len=ctx.kv_len)
    want = []
    for kind in KINDS:
        plan = planner._build(torch.tensor([[kind == "temporal"]]), ctx)
        error = (attention(*x, plan, kv_len=ctx.kv_len) - dense).square() * real
        want.append(error[:, ctx.video_slice].mean((1, 3)))
    q, k, v = (t.masked_fill(~real, math.nan) for t in (q, k, v))
    found = planner.errors(q, k, v, ctx)
    torch.testing.assert_close(found.double(), torch.stack(want, -1), atol=1e-6, rtol=1e-4)


def test_chosen_kind_has_the_smaller_error(context, smooth):
    grid = (6, 12, 12)
    q, k, v = smooth(grid, 6, 16, 2.0, 0)
    planner = SVG1(sparsity=0.7, block=36, rows=10**6)
    dense = attention(q, k, v)
    ctx = context(grid)

    def error(temporal):
        return (attention(q, k, v, planner._build(temporal, ctx)) - dense).square().mean((1, 3))

    no = torch.zeros(1, 6, dtype=torch.bool)
    best = torch.minimum(error(no), error(~no))
    plan = planner.decision(q, k, v, ctx).plan
    torch.testing.assert_close((attention(q, k, v, plan) - dense).square().mean((1, 3)), best)


@pytest.mark.parametrize("lengths", [(320, 317), (309, 250)])
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
def test_padding_changes_no_bit(context, lengths, text, text_first):
    ctx = context((5, 7, 9), text, text_first=text_first)
    ctx.kv_len = torch.tensor([min(n, ctx.num_tokens) for n in lengths])
    inputs = random(ctx, batch=2)
    real = torch.arange(ctx.num_tokens) < ctx.kv_len[:, None]
    found = []
    for filling in (None, 1e4, math.nan):
        q, k, v = inputs if filling is None else (x.masked_fill(~real[..., None, None], filling) for x in inputs)
        plan = SVG1(sparsity=0.6, block=16).decision(q, k, v, ctx).plan.validate()
        found.append(vdit_fast.attention(q, k, v, plan, kv_len=ctx.kv_len)[real])
    assert found[0].isfinite().all() and all(torch.equal(found[0], out) for out in found)


def test_choice_is_made_in_every_call_or_kept(context):
    grid = (6, 4, 6)
    frame, place = one_hot(grid, 0), one_hot(grid, 1)
    v = torch.randn_like(frame)
    knobs = {"sparsity": 0.75, "sinks": 0, "block": 6}
    spatial, temporal = (fixed(SVG1(**knobs), context(grid), kind) for kind in KINDS)
    state: dict = {}

    def chosen(x, planner, step=0, **where):
        ctx = context(grid, step=StepContext(step=step, **where), state=state)
        mask = planner.decision(x, x, v, ctx).plan.to_mask()[0, 0]
        return "spatial" if torch.equal(mask, spatial) else "temporal" if torch.equal(mask, temporal) else None

    every, once, third = SVG1(**knobs), SVG1(**knobs, refresh=0), SVG1(**knobs, refresh=3)
    for step in (-1, -1, 0, 1):
        assert chosen(frame, every, step) == "spatial" and chosen(place, every, step) == "temporal"
    assert chosen(frame, once) == "spatial" and chosen(place, once, 7) == "spatial"
    assert chosen(place, once, branch=1) == "temporal" and chosen(place, once, generation=1) == "temporal"
    assert [chosen(x, third, s) for s, x in ((1, frame), (3, place), (4, place), (6, frame), (7, frame))] == [
        "spatial",
        "spatial",
        "temporal",
        "temporal",
        "spatial",
    ]


def test_error_falls_as_density_grows(context, smooth):
    grid, sparsities = (6, 12, 12), (0.95, 0.8, 0.6, 0.3, 0.0)
    mean = torch.zeros(len(sparsities))
    for seed in range(3):
        q, k, v = smooth(grid, 2, 16, 2.0, seed)
        dense = attention(q, k, v)
        for i, s in enumerate(sparsities):
            plan = SVG1(sparsity=s, block=36).decision(q, k, v, context(grid)).plan
            mean[i] += (attention(q, k, v, plan) - dense).norm() / dense.norm() / 3
    assert (mean.diff() < 0).all() and mean[-1] < 1e-5, mean


def test_same_inputs_same_plan_without_gradient(context):
    ctx = context((5, 7, 9), 3)
    q, k, v = random(ctx)
    first, again, fresh = (
        SVG1(block=16).decision(q, k, v.requires_grad_(), c).plan.op_args() for c in (ctx, ctx, context((5, 7, 9), 3))
    )
    for a, b, c in zip(first, again, fresh, strict=True):
        assert a is None or (torch.equal(a, b) and torch.equal(a, c) and not a.requires_grad)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_gives_nan_and_no_crash(context, which):
    ctx = context((5, 7, 9), 4)
    inputs = random(ctx)
    inputs[which][0, 100, 1, 3] = math.nan
    plan = SVG1(block=16).decision(*inputs, ctx).plan.validate()
    out = vdit_fast.attention(*inputs, plan)
    assert out[:, :, 0].isfinite().all() and out[0, 100, 1].isnan().any()


def test_dense_decisions_and_plan_without_values(context):
    ctx = context((5, 7, 9))
    q, k, v = random(ctx)
    decision = SVG1(dense_steps=2).decision(q, k, v, ctx)
    assert decision.plan is None and decision.reason == "step 0 < dense_steps 2" and not ctx.state
    with pytest.raises(TypeError, match=r"svg1 .*call decision\(q, k, v, ctx\)"):
        SVG1().plan(q, k, ctx)
    with pytest.raises(ValueError, match="tokens"):
        SVG1().decision(q, k, v, context((5, 7, 8)))


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({"sparsity": 1}, "sparsity"),
        ({"sparsity": math.nan}, "sparsity"),
        ({"rows": 0}, "rows"),
        ({"refresh": -1}, "refresh"),
        ({"block": 0}, "block"),
        ({"block": 1.5}, "block"),
    ],
)
def test_bad_settings_name_the_knob(knobs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        from_dict({"method": "svg1", **knobs})


def test_published_settings():
    for model in MODELS:
        planner = SVG1.for_model(model)
        assert from_dict(planner.to_dict()) == planner
    assert SVG1.for_model("wan-i2v-14b-720p", sparsity=0.5) == SVG1(sparsity=0.5, dense_steps=0.35, dense_layers=1)
    with pytest.raises(ValueError, match="known: wan-t2v"):
        SVG1.for_model("wan")


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    block=st.integers(1, 40),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 7),
    sparsity=st.floats(0, 0.999),
)
def test_any_shape_gives_a_valid_plan_without_empty_rows(grid, block, text, text_first, sinks, sparsity):
    ctx = LayerContext(0, 1, "a", grid, math.prod(grid), text, text_first)
    planner = SVG1(sparsity=sparsity, block=block, sinks=sinks, rows=4)
    mask = planner.decision(*random(ctx), ctx).plan.validate().to_mask()
    assert mask.any(-1).all()
    assert mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    assert mask[..., ctx.video_slice][..., : sinks * grid[1] * grid[2]].all()
