"""Sparse VideoGen2: clusters, estimated mass, selection, layouts with text and padding, what is kept between calls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vdit_fast
from vdit_fast import ops
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import SVG2, from_dict
from vdit_fast.planners._sampling import spread
from vdit_fast.planners.svg2 import MODELS, masses
from vdit_fast.reference import attention

LAYOUTS = [(0, False), (5, False), (5, True)]
SMALL = {"q_clusters": 6, "k_clusters": 14}


def random(ctx, heads=2, dim=8, batch=1, kv_heads=None):
    q = torch.randn(batch, ctx.num_tokens, heads, dim)
    return q, *torch.randn(2, batch, ctx.num_tokens, kv_heads or heads, dim).unbind()


def labels(part):
    """Cluster of every clustered token, int64 [B, H, n]; the padding is one more cluster."""
    batch, heads, n = part.order.shape
    member = torch.arange(part.lengths.shape[2]).repeat(batch * heads)
    label = member.repeat_interleave(part.lengths.flatten().long()).view(batch, heads, n)
    return torch.empty_like(label).scatter_(2, part.order.long(), label)


@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("knobs", [{"top_p": 0.6, "min_keep_ratio": 0.0}, {"sparsity": 0.6}])
def test_mask_is_the_map_of_the_labels_plus_text_and_sinks(context, text, text_first, sinks, knobs):
    ctx = context((5, 7, 9), text, text_first=text_first)
    q, k, _ = random(ctx, heads=4, batch=2, kv_heads=2)
    planner = SVG2(**SMALL, **knobs, sinks=sinks)
    mask = planner.plan(q, k, ctx).validate().to_mask()
    ctx.state.clear()
    rows, columns = planner.clusters(q, k, ctx)
    chosen = planner.select(masses(rows, columns), columns.sizes)
    row, column = labels(rows), labels(columns).repeat_interleave(2, 1)
    assert row.shape[2] == 315 and column.shape[2] == 315 - 63 * sinks
    want = torch.ones_like(mask)
    first = ctx.video_slice.start
    for b in range(2):
        for h in range(4):
            video = chosen[b, h][row[b, h]][:, column[b, h]]
            want[b, h, ctx.video_slice, first + 63 * sinks : first + 315] = video
    assert torch.equal(mask, want) and mask.float().mean() < 0.95


@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
@pytest.mark.parametrize("knobs", [{"top_p": 1}, {"top_p": 0.1, "min_keep_ratio": 1}, {"sparsity": 0}])
@pytest.mark.parametrize("grid", [(5, 7, 9), (1, 1, 1), (3, 4, 4)])
def test_full_budget_is_dense(context, text, text_first, knobs, grid):
    ctx = context(grid, text, text_first=text_first)
    q, k, v = random(ctx, heads=4, batch=2, kv_heads=2)
    plan = SVG2(**knobs).plan(q, k, ctx).validate()
    assert plan.density == 1
    torch.testing.assert_close(
        attention(*(x.double() for x in (q, k, v)), plan), attention(*(x.double() for x in (q, k, v)))
    )


def test_top_p_keeps_the_cluster_that_crosses():
    mass = torch.tensor([0.5, 0.3, 0.15, 0.05])[torch.tensor([2, 0, 3, 1])].expand(1, 1, 3, 4).contiguous()
    sizes = torch.ones(1, 1, 4, dtype=torch.int32)
    exact = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(1, 1, 1, 4).contiguous()
    for p, kept in ((0, 1), (0.49, 1), (0.79, 2), (0.8 + 1e-6, 3), (0.94, 3), (0.96, 4), (0.99, 4), (1.0, 4)):
        assert (SVG2(top_p=p, min_keep_ratio=0).select(mass, sizes).sum(-1) == kept).all(), p
    for p, kept in ((0.5, 2), (0.75, 3), (0.74, 2), (0.875, 4), (0, 1)):  # at equality one more stays
        assert SVG2(top_p=p, min_keep_ratio=0).select(exact, sizes).sum() == kept, p
    for ratio, kept in ((0.24, 1), (0.5, 2), (0.75, 3), (1, 4)):
        chosen = SVG2(top_p=0, min_keep_ratio=ratio).select(mass, sizes)
        assert (chosen.sum(-1) == kept).all() and chosen[..., 1].all()  # the heaviest is among them


def test_nothing_but_the_heaviest_cluster_without_a_budget(context):
    ctx = context((5, 7, 9))
    q, k, _ = random(ctx)
    planner = SVG2(**SMALL, top_p=0, min_keep_ratio=0)
    rows, columns = planner.clusters(q, k, ctx)
    mass = masses(rows, columns)
    chosen = planner.select(mass, columns.sizes)
    assert (chosen.sum(-1) == 1).all()
    assert torch.equal(chosen.int().argmax(-1), mass.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), clusters=st.integers(1, 40), sparsity=st.floats(0, 0.99))
def test_sparsity_takes_the_largest_clusters_up_to_the_nearest_size(seed, clusters, sparsity):
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 30, (1, 1, clusters), generator=rng, dtype=torch.int32)
    sizes[..., 0] = 7
    scores = torch.randn(1, 2, 3, clusters, generator=rng) * 2
    mass = ((scores.exp() * sizes[:, :, None]) / (scores.exp() * sizes[:, :, None]).sum(-1, keepdim=True)).float()
    chosen = SVG2(sparsity=sparsity).select(mass, sizes)
    read = (chosen * sizes[:, :, None]).sum(-1).double()
    budget, most = (1 - sparsity) * float(sizes.sum()), float(sizes.max())
    assert (chosen.sum(-1) >= 1).all() and (read <= budget + most / 2 + 1e-6).logical_or(chosen.sum(-1) == 1).all()
    assert (read >= budget - most / 2 - 1e-6).all()
    least, other = mass.masked_fill(~chosen, math.inf).amin(-1), mass.masked_fill(chosen, -math.inf).amax(-1)
    assert (least >= other).all()


def test_density_is_the_one_asked_for(context, smooth):
    grid = (6, 12, 12)
    q, k, _ = smooth(grid, 4, 16, 2.0, 0)
    for sparsity in (0.9, 0.75, 0.5, 0.25):
        assert abs(SVG2(sparsity=sparsity).plan(q, k, context(grid)).density - (1 - sparsity)) < 0.02
    # the formula of the paper, sum of map |Q_i| |K_j| over all pairs
    planner, ctx = SVG2(top_p=0.7), context(grid)
    density = planner.plan(q, k, ctx).density
    rows, columns = planner.clusters(q, k, context(grid))
    chosen = planner.select(masses(rows, columns), columns.sizes).double()
    pairs = torch.einsum("bhij,bhi,bhj->bh", chosen, rows.sizes.double(), columns.sizes.double())
    assert density == pytest.approx(float(pairs.mean()) / 864**2)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_mass_is_exact_for_copies_of_the_centroids(context, kv_heads):
    grid, points = (3, 8, 10), 9
    ctx = context(grid)
    pick = torch.randint(0, points, (2, 240))
    q = (torch.randn(2, points, 2, 8) * 2).take_along_dim(pick[..., None, None], 1)
    k = (torch.randn(2, points, kv_heads, 8) * 2).take_along_dim(pick.flip(1)[..., None, None], 1)
    rows, columns = SVG2(q_clusters=60, k_clusters=60).clusters(q, k, ctx)
    assert (columns.sizes == 0).any()  # more clusters than points: some are empty
    group = 2 // kv_heads
    exact = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(group, 2)) / math.sqrt(8)
    member = torch.nn.functional.one_hot(labels(columns), 60).double().repeat_interleave(group, 1)
    want = torch.softmax(exact, -1) @ member
    found = masses(rows, columns).double().take_along_dim(labels(rows)[..., None], 2)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


def test_centroids_are_the_means_and_lie_ever_closer(context):
    ctx = context((5, 7, 9))
    q, k, _ = random(ctx, heads=3)
    last = math.inf
    for iterations in (1, 2, 4, 8, 30):
        rows, columns = SVG2(**SMALL, first_iterations=iterations).clusters(q, k, context((5, 7, 9)))
        for part, x in ((rows, q), (columns, k)):
            assert (part.sizes.sum(-1) == 315).all()
            member = torch.nn.functional.one_hot(labels(part), part.sizes.shape[2]).double()
            mean = (member.mT @ x.transpose(1, 2).double()) / member.sum(2)[..., None]
            torch.testing.assert_close(part.centroids.double(), mean, atol=1e-5, rtol=1e-5)
        spreads = (q.transpose(1, 2) - rows.centroids.take_along_dim(labels(rows)[..., None].long(), 2)).square().sum()
        assert spreads <= last * (1 + 1e-6)
        last = float(spreads)


def test_perfect_partition_and_empty_clusters():
    points = torch.randn(1, 1, 5, 8)
    pick = torch.arange(50) % 5
    x = points[0, :, pick].transpose(0, 1)[None]  # [1, 50, 1, 8]
    far = torch.full((1, 1, 1, 8), 1e3)
    order, counts, centroids = ops.kmeans(x, torch.cat([points, far], 2), 3)
    assert counts.tolist() == [[[10] * 5 + [0]]] and torch.equal(centroids[:, :, 5:], far)
    torch.testing.assert_close(centroids[:, :, :5], points)
    assert torch.equal(pick[order.flatten().long()], torch.arange(5).repeat_interleave(10))


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("lengths", [(320, 317), (309, 250), (1, 300)])
@pytest.mark.parametrize(("text", "text_first"), LAYOUTS)
def test_padding_changes_no_bit(context, lengths, text, text_first, compensate):
    ctx = context((5, 7, 9), text, text_first=text_first)
    kv_len = torch.tensor([min(n, ctx.num_tokens) for n in lengths])
    ctx.kv_len = kv_len
    inputs = random(ctx, batch=2)
    real = torch.arange(ctx.num_tokens) < kv_len[:, None]
    planner = SVG2(**SMALL, sparsity=0.5, compensate=compensate, sinks=1)
    found = []
    for filling in (None, 1e4, math.nan, -3e30):
        ctx.state.clear()
        for step in range(2):
            q, k, v = inputs if filling is None else (x.masked_fill(~real[..., None, None], filling) for x in inputs)
            ctx.step = StepContext(step=step)
            plan = planner.plan(q, k, ctx).validate()
            found.append(vdit_fast.attention(q, k, v, plan, kv_len=kv_len)[real])
    assert found[0].isfinite().all()
    for i, out in enumerate(found):
        assert torch.equal(out, found[i % 2])


def test_padding_clusters_are_those_of_the_real_tokens(context):
    """Item 1 is 250 real tokens and padding: its clusters are those of a clip of 250 tokens."""
    grid = (5, 7, 9)
    q, k, v = random(context(grid), batch=2)
    planner = SVG2(**SMALL, sparsity=0.5)
    kv_len = torch.tensor([315, 250])
    mask = planner.plan(q, k, context(grid, kv_len=kv_len)).validate().to_mask()
    whole = planner.plan(q[:1], k[:1], context(grid)).to_mask()
    short = planner.plan(q[1:, :250], k[1:, :250], context((1, 1, 250))).to_mask()
    assert torch.equal(mask[:1], whole) and torch.equal(mask[1:, :, :250, :250], short)
    assert not mask[1, :, :, 250:].any()  # nothing is read in vain
    assert mask[1, :, 250:, :250].all()  # padding rows do what they do in dense attention
    full = SVG2(top_p=1).plan(q, k, context(grid, kv_len=kv_len))
    torch.testing.assert_close(attention(q, k, v, full, kv_len=kv_len), attention(q, k, v, kv_len=kv_len))


def test_grouped_heads_are_repeated_heads(context):
    ctx = context((5, 7, 9), 3)
    q, k, _ = random(ctx, heads=6, kv_heads=2)
    one = SVG2(**SMALL, sinks=1).plan(q, k, ctx)
    two = SVG2(**SMALL, sinks=1).plan(q, k.repeat_interleave(3, 2), context((5, 7, 9), 3))
    assert torch.equal(one.to_mask(), two.to_mask())


def test_centroids_are_kept_per_place_and_generation(context):
    grid = (5, 7, 9)
    planner, state = SVG2(**SMALL, first_iterations=3, iterations=1), {}
    old, new = (random(context(grid))[:2] for _ in range(2))

    def centroids(inputs, step=0, layer=0, **where):
        ctx = context(grid, layer=layer, step=StepContext(step=step, **where), state=state)
        return planner.clusters(*inputs, ctx)[1].centroids

    first = centroids(old)
    fresh = planner.clusters(*new, context(grid))[1].centroids
    followed = centroids(new, step=1)
    torch.testing.assert_close(followed, ops.kmeans(new[1], first, 1)[2], rtol=0, atol=0)
    assert not torch.equal(followed, fresh)
    for place in ({"layer": 1}, {"branch": 1}, {"expert": "transformer_2"}, {"frame_block": 2}, {"generation": 1}):
        assert torch.equal(centroids(new, **place), fresh), place
    assert centroids([x.expand(2, -1, -1, -1) for x in new], step=2).shape[0] == 2  # another batch begins anew
    state.clear()
    assert torch.equal(centroids(old), first)


def test_a_second_generation_is_the_first_one(context):
    grid, state, runs = (5, 7, 9), {}, []
    inputs = [random(context(grid))[:2] for _ in range(3)]
    for generation in range(2):
        for step, (q, k) in enumerate(inputs):
            ctx = context(grid, step=StepContext(step=step, generation=generation), state=state)
            runs.append(SVG2(sparsity=0.7).plan(q, k, ctx).op_args())
    for one, two in zip(runs[:3], runs[3:], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_warm_centroids_follow_the_dense_steps_only(context):
    grid = (5, 7, 9)
    q, k, v = random(context(grid))
    step = StepContext(step=0, num_steps=10)
    for knobs, layer, kept in (
        ({"warm": True}, 1, True),
        ({"warm": False}, 1, False),
        ({"warm": True}, 0, False),  # a layer that is always dense
        ({"warm": True, "min_tokens": 400}, 1, False),
    ):
        ctx = context(grid, layer=layer, step=step)
        decision = SVG2(dense_steps=2, dense_layers=1, **knobs).decision(q, k, v, ctx)
        assert decision.plan is None and decision.reason and bool(ctx.state) == kept
    ctx = context(grid, step=StepContext(step=5, num_steps=10))
    assert SVG2(dense_steps=2, warm=True).decision(q, k, v, ctx).plan is not None


def test_number_of_clusters(context):
    assert SVG2().counts(context((24, 16, 16))) == (78, 314)
    assert SVG2().counts(context((21, 45, 80))) == (275, 1100)
    assert SVG2(q_clusters=10**6, k_clusters=10**6, sinks=1).counts(context((4, 5, 5))) == (100, 75)
    assert SVG2().counts(context((1, 1, 1))) == (1, 1)
    ctx = context((2, 3, 3))
    q, k, _ = random(ctx)
    SVG2(q_clusters=500, k_clusters=1).plan(q, k, ctx).validate()


@given(count=st.integers(1, 400), total=st.integers(1, 10**6))
def test_seeds_are_spread(count, total):
    device = torch.device("cpu")
    at = spread(count, total, device)
    assert at.min() >= 0 and at.max() < total
    assert torch.equal(spread(count, torch.tensor([[total], [1]]), device), torch.stack([at, torch.zeros_like(at)]))
    if count <= 0.44 * total:
        assert len(at.unique()) == count
        edges = torch.nn.functional.pad(at.sort().values, (1, 1), value=0)
        edges[-1] = total
        assert edges.diff().max() <= 3 * total / count + 1


@pytest.mark.parametrize("which", ["q", "k"])
def test_nan_gives_nan_and_no_crash(context, which):
    ctx = context((5, 7, 9), 4)
    q, k, v = random(ctx)
    (q if which == "q" else k)[0, 100, 1, 3] = math.nan
    for step in range(2):
        ctx.step = StepContext(step=step)
        plan = SVG2(**SMALL, sparsity=0.6).plan(q, k, ctx).validate()
        out, dense = (vdit_fast.attention(q, k, v, p) for p in (plan, None))
        assert out[:, :, 0].isfinite().all()
        assert torch.equal(out[:, :, 1].isnan() | ~dense[:, :, 1].isnan(), torch.ones_like(out[:, :, 1], dtype=bool))
    q, k, _ = random(ctx)
    ctx.step = StepContext(step=2)
    plan = SVG2(**SMALL, sparsity=0.6).plan(q, k, ctx)  # one clean call later all is as before
    assert vdit_fast.attention(q, k, v, plan).isfinite().all() and plan.density < 0.6


def test_half_precision_and_strides(context, smooth):
    grid = (6, 12, 12)
    q, k, _ = (x.bfloat16() for x in smooth(grid, 2, 16, 2.0, 0))
    wide = torch.stack([q, k], 3).flatten(3)  # [1, N, H, 2 D]: strided views
    one = SVG2(sparsity=0.7).plan(q, k, context(grid))
    two = SVG2(sparsity=0.7).plan(wide[..., :16], wide[..., 16:], context(grid))
    assert torch.equal(one.to_mask(), two.to_mask()) and abs(one.density - 0.3) < 0.02


def test_compensation_helps_and_follows_content(context, smooth):
    grid = (6, 12, 12)
    q, k, v = smooth(grid, 2, 16, 2.0, 0)
    dense = attention(q, k, v)
    error = {}
    for name, knobs in (("plain", {}), ("compensated", {"compensate": True})):
        plan = SVG2(sparsity=0.75, **knobs).plan(q, k, context(grid))
        error[name] = float((attention(q, k, v, plan) - dense).norm() / dense.norm())
    blind = SVG2(sparsity=0.75).plan(torch.randn_like(q), torch.randn_like(k), context(grid))
    assert error["compensated"] < 0.7 * error["plain"]
    assert error["plain"] < 0.6 * float((attention(q, k, v, blind) - dense).norm() / dense.norm())


@pytest.mark.parametrize("knob", ["q_clusters", "k_clusters", "first_iterations", "iterations"])
def test_counts_are_positive(knob):
    for value in (0, -3):
        with pytest.raises(ValueError, match=knob):
            from_dict({"method": "svg2", knob: value})
    with pytest.raises(TypeError, match=knob):
        SVG2(**{knob: 2.5})


@pytest.mark.parametrize("knob", ["top_p", "min_keep_ratio", "sparsity"])
def test_shares_lie_between_0_and_1(knob):
    for value in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=knob):
            SVG2(**{knob: value})
    for value in ("0.5", True):
        with pytest.raises(TypeError, match=knob):
            SVG2(**{knob: value})
    with pytest.raises(TypeError, match="compensate"):
        SVG2(compensate=1)


def test_sinks_that_leave_nothing_are_a_reason(context):
    ctx = context((4, 5, 5))
    q, k, v = random(ctx)
    assert SVG2(sinks=4).decision(q, k, v, ctx).reason == "sinks 4 cover all 4 frames"
    with pytest.raises(ValueError, match="fewer sinks"):
        SVG2(sinks=9).plan(q, k, ctx)


def test_published_settings():
    assert SVG2.for_model("wan-t2v-14b-720p") == SVG2(
        q_clusters=300,
        k_clusters=1000,
        top_p=0.9,
        min_keep_ratio=0.1,
        first_iterations=50,
        dense_steps=0.2,
        dense_layers=1,
    )
    assert SVG2.for_model("hunyuan-video-480p", top_p=0.8).top_p == 0.8
    for model in MODELS:
        planner = SVG2.for_model(model)
        assert from_dict(planner.to_dict()) == planner
    with pytest.raises(ValueError, match="known: wan-t2v"):
        SVG2.for_model("wan")


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 1),
    clusters=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    knobs=st.sampled_from([{"top_p": 0.5}, {"sparsity": 0.7}, {"top_p": 0.0, "min_keep_ratio": 0.0}]),
    padding=st.integers(0, 30),
)
def test_any_shape_gives_a_valid_plan_without_empty_rows(grid, text, text_first, sinks, clusters, knobs, padding):
    n = math.prod(grid) + text
    kv_len = torch.tensor([max(n - padding, 1), n]) if padding else None
    ctx = LayerContext(0, 1, "a", grid, math.prod(grid), text, text_first, kv_len=kv_len)
    q, k, v = random(ctx, batch=2)
    decision = SVG2(q_clusters=clusters[0], k_clusters=clusters[1], sinks=sinks, **knobs).decision(q, k, v, ctx)
    if decision.plan is None:
        assert sinks >= grid[0]
        return
    mask = decision.plan.validate().to_mask()
    if kv_len is not None:
        mask = mask & (torch.arange(n) < kv_len.view(-1, 1, 1, 1))
    assert mask.any(-1).all() or (kv_len is not None and int(kv_len[0]) <= text)
