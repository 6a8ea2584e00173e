"""AdaSpa: attention mass between blocks, budgets, searches over a schedule, padding, state."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_calls import ODD_GRIDS, TEXTS, call, dense_weights, draw, kind, layer, plans_equal

from vdit_fast.planners import AdaSpa, from_dict
from vdit_fast.planners._strips import equal
from vdit_fast.planners.adaspa import _pack, _unpack, budgets, kept_blocks
from vdit_fast.reference import attention

GRID = (5, 7, 9)


def exact_mass(q, k, ctx, block, kv_len=None):
    """Block sums of the exact weights of real video queries on video keys, fp64, the slow and obvious way."""
    weights = dense_weights(q, k, kv_len)
    if kv_len is not None:
        weights = weights * (torch.arange(ctx.num_tokens) < kv_len.view(-1, 1))[:, None, :, None]
    video = weights[..., ctx.video_slice, ctx.video_slice]
    rows = [part.sum(2) for part in video.split(block, 2)]
    return torch.stack([torch.stack([p.sum(-1) for p in row.split(block, -1)], -1) for row in rows], 2)


def remembered(state):
    """What the only layer keeps."""
    (found,) = [x for key, x in state.items() if key[0] == "adaspa"]
    return found


# ------------------------------------------------------------------ mass
@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize(("text", "text_first"), TEXTS)
@pytest.mark.parametrize("block", [16, 64])
def test_mass_is_the_block_sum_of_the_softmax(grid, text, text_first, block):
    ctx = layer(grid, text, text_first)
    q, k, v = draw(ctx, 4, 16, 2, kv_heads=2)
    _, lse = attention(q * 2, k, v, return_lse=True)
    mass = AdaSpa(block=block).mass(q * 2, k, lse[:, :, ctx.video_slice], ctx)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), exact_mass(q * 2, k, ctx, block), atol=1e-5, rtol=1e-5)
    rows = torch.tensor(equal(ctx.n_video, block)).double()
    share = dense_weights(q * 2, k)[..., ctx.video_slice, ctx.video_slice].sum(-1)  # without text: 1 per row
    on_video = torch.stack([part.sum(-1) for part in share.split(block, -1)], -1)
    torch.testing.assert_close(mass.double().sum(-1), on_video, atol=1e-5, rtol=1e-5)
    if not text:
        torch.testing.assert_close(mass.double().sum(-1), rows.expand_as(mass[..., 0]), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ selection
@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_sparsity_zero_is_dense(grid, text, text_first):
    ctx = layer(grid, text, text_first)
    planner = AdaSpa(block=16, sparsity=0.0, head_adaptive=False)
    assert planner.plan(*draw(ctx)[:2], ctx).validate().density == 1


@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_rows_keep_their_heaviest_blocks_and_text_and_sinks(grid, text, text_first):
    planner, ctx = AdaSpa(block=16, sparsity=0.6, head_adaptive=False, sinks=1), layer(grid, text, text_first)
    q, k, _ = draw(ctx, 2, 16, 2)
    mask = planner.plan(q, k, ctx).validate().to_mask()
    assert mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    mass = exact_mass(q, k, ctx, 16)
    n = mass.shape[-1]
    largest = mass.topk(kept_blocks(0.6, n), -1).indices
    keep = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, largest, True)
    keep |= torch.arange(n) * 16 < grid[1] * grid[2]
    label = torch.arange(ctx.n_video) // 16
    assert torch.equal(mask[..., ctx.video_slice, ctx.video_slice], keep[:, :, label][..., label])


def test_kept_blocks():
    assert kept_blocks(0.8, 1182) == 236 and kept_blocks(0.8, 1857) == 371
    assert kept_blocks(0.5, 5) == 3 and kept_blocks(0.9, 5) == 1 and kept_blocks(0.99, 5) == 1  # half up, never none
    assert kept_blocks(0.0, 7) == 7 and kept_blocks(0.8, 1) == 1


@given(
    sparsity=st.floats(1 / 3, 0.999),
    blocks=st.integers(1, 400),
    recall=st.lists(st.floats(0, 1), min_size=1, max_size=13),
)
def test_budgets_preserve_the_average_and_the_ranks(sparsity, blocks, recall):
    kept, heads = kept_blocks(sparsity, blocks), len(recall)
    found = budgets(torch.tensor([recall]), kept)[0]
    assert found.sum() == heads * kept  # exactly, whatever the rounding
    assert found.min() >= 1 and found.max() <= blocks
    easy = min(sum(torch.tensor(r) > 0.8 for r in recall), heads // 2)
    by_recall = found[torch.tensor(recall).argsort(descending=True, stable=True)].tolist()
    few, many = (kept + 1) // 2, kept + kept // 2
    assert by_recall == [few] * easy + [kept] * (heads - 2 * easy) + [many] * easy


def test_budgets_are_those_of_the_paper():
    recall = torch.tensor([[0.5, 0.95, 0.7, 0.85, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]])
    # s = 0.8 of 100 blocks: (1 + s)/2 = 0.9 and (3s - 1)/2 = 0.7
    assert budgets(recall, 20).tolist() == [[30, 10, 20, 10, 30], [20] * 5]
    assert budgets(torch.tensor([[0.9, 0.99, 0.95, 0.85]]), 20).tolist() == [[30, 10, 10, 30]]  # c = 4, clamped to 2
    assert budgets(torch.tensor([[math.nan, 0.99, 0.9, 0.5]]), 20).tolist() == [[30, 10, 10, 30]]
    assert budgets(torch.tensor([[0.9]]), 20).tolist() == [[20]]


def test_head_adaptive_budgets_reach_the_plan():
    planner, ctx = AdaSpa(block=16, sparsity=0.8), layer((4, 8, 16))
    q, k, _ = draw(ctx, 4, 16, 2)
    label = torch.arange(ctx.n_video) // 16
    q[0, :, 2] = k[0, :, 2] = 3 * torch.randn(32, 16)[label]  # reads its own block: high recall
    keep = planner.select(planner.mass(q, k, attention(q, k, k, return_lse=True)[1], ctx), ctx)
    kept = kept_blocks(0.8, 32)
    counts = keep.sum(-1)
    assert (counts == counts[..., :1]).all()  # the same in all rows of a head
    mass = exact_mass(q, k, ctx, 16)
    recall = mass.topk(kept, -1).values.sum((-2, -1)) / mass.sum((-2, -1))
    assert (recall[0] > 0.8).sum() == 1 and (recall[1] <= 0.8).all()
    want = torch.full((2, 4), kept)
    want[0, 2], want[0, recall[0].argmin()] = (kept + 1) // 2, kept + kept // 2
    assert torch.equal(counts[..., 0], want)
    uniform = AdaSpa(block=16, sparsity=0.8, head_adaptive=False).plan(q, k, ctx).density
    assert abs(planner.plan(q, k, ctx).density - uniform) < 1e-9  # equal blocks: the mean density is the same


def test_sinks_count_as_kept_when_heads_are_ranked():
    planner, ctx = AdaSpa(block=16, sparsity=0.8, sinks=4), layer((10, 4, 4))  # ten blocks, the first four are sinks
    spread, mostly_sinks = torch.ones(10), torch.zeros(10)
    mostly_sinks[[0, 1, 2, 3, 9]] = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])
    mass = torch.stack([spread, mostly_sinks])[None, :, None].expand(1, 2, 10, 10).contiguous()
    assert planner.select(mass, ctx).sum(-1)[0, :, 0].tolist() == [3, 1]  # recall 0.5 and 1
    assert AdaSpa(block=16).select(mass, ctx).sum(-1)[0, :, 0].tolist() == [2, 2]  # 0.2 and 0.5


def test_block_diagonal_attention_is_found():
    ctx = layer((2, 8, 16))
    label = torch.arange(256) // 16
    q = torch.nn.functional.one_hot(label, 16).float()[None, :, None].expand(-1, -1, 2, -1) * 10
    planner = AdaSpa(block=16, sparsity=0.9, head_adaptive=False)
    mass = planner.mass(q, q, attention(q, q, q, return_lse=True)[1], ctx)
    keep = planner.select(mass, ctx)
    assert keep.diagonal(dim1=-2, dim2=-1).all()
    assert (mass * keep).sum() / mass.sum() > 0.999
    v = torch.randn_like(q)
    torch.testing.assert_close(attention(q, q, v, planner.plan(q, q, ctx)), attention(q, q, v), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 31, 31), (1, 2, 32, 32), (2, 1, 70, 70)])
def test_packed_blocks_come_back(shape):
    keep = torch.rand(shape) < 0.3
    packed = _pack(keep)
    assert packed.dtype == torch.int32 and packed.numel() == math.prod(shape[:3]) * math.ceil(shape[3] / 32)
    assert torch.equal(_unpack(packed), keep)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    block=st.integers(1, 70),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 5),
    sparsity=st.floats(0.34, 0.99),
)
def test_any_shape_gives_a_valid_plan_without_empty_rows(grid, block, text, text_first, sinks, sparsity):
    ctx = layer(grid, text, text_first)
    mask = AdaSpa(block=block, sparsity=sparsity, sinks=sinks).plan(*draw(ctx, 3, 4)[:2], ctx).validate().to_mask()
    assert mask.any(-1).all() and mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    assert mask[..., ctx.video_slice][..., : sinks * grid[1] * grid[2]].all()


# ------------------------------------------------------------------ schedule
def schedule(planner, num_steps=50, steps=None, state=None, **fields):
    """Kinds of the calls of a generation, and the decisions."""
    state, found = {} if state is None else state, []
    for step in steps or range(num_steps):
        ctx = layer((2, 4, 8), step=step, num_steps=num_steps, state=state, **fields)
        found.append(call(planner, ctx, *draw(ctx))[0])
    return [kind(d) for d in found], found


@pytest.mark.parametrize(("steps", "first"), [(50, 10), (12, 2), (4, 0), (1, 0)])
def test_dense_until_the_first_search_then_sparse(steps, first):
    kinds, found = schedule(AdaSpa(block=8), steps)
    assert kinds == ["dense"] * first + ["observed"] + ["sparse"] * (steps - first - 1)
    assert "searches" in found[first].reason and all((d.reason is None) == (d.plan is not None) for d in found)


def test_plans_change_at_searches_only():
    _, found = schedule(AdaSpa(block=8, search=(10, 30), dense_steps=10))
    plans = [d.plan for d in found]
    same = [plans_equal(a, b) for a, b in itertools.pairwise(plans[11:])]
    assert [i + 12 for i, equal in enumerate(same) if not equal] == [30]


def test_cached_search_with_the_same_inputs_finds_the_same_blocks():
    planner, state = AdaSpa(block=16, search=(0, 1), dense_steps=0), {}
    ctx = [layer(GRID, 13, step=i, state=state) for i in range(2)]
    q, k, v = draw(ctx[0], 4)
    call(planner, ctx[0], q, k, v)
    first = remembered(state).lists
    again, _ = call(planner, ctx[1], q, k, v)
    assert remembered(state).searches == 2 and torch.equal(remembered(state).lists, first)
    assert plans_equal(again.plan, planner.plan(q, k, ctx[1]))  # and those of a search from scratch


def test_cached_search_uses_the_stale_lse_and_the_new_inputs_in_the_same_call():
    planner, state = AdaSpa(block=16, search=(0, 1), dense_steps=0), {}
    ctx = [layer(GRID, 13, True, step=i, state=state) for i in range(2)]
    q, k, v = draw(ctx[0], 4, 16, 2)
    call(planner, ctx[0], q, k, v)
    later = [x + 0.5 * torch.randn_like(x) for x in (q, k, v)]
    found, _ = call(planner, ctx[1], *later)
    stale = attention(q, k, v, return_lse=True)[1][:, :, ctx[0].video_slice]
    keep = planner.select(planner.mass(later[0], later[1], stale, ctx[1]), ctx[1])
    mask = found.plan.to_mask()[..., ctx[1].video_slice, ctx[1].video_slice]
    label = torch.arange(ctx[1].n_video) // 16
    assert torch.equal(mask, keep[:, :, label][..., label])
    assert not torch.equal(keep, planner.select(planner.mass(q, k, stale, ctx[0]), ctx[0]))


def test_missed_searches_are_made_up_for():
    planner = AdaSpa(block=8, search=(10, 30), dense_steps=10)
    kinds, _ = schedule(planner, steps=[*range(8), 13, 14])  # a cache skipped 8 to 12
    assert kinds[-2:] == ["observed", "sparse"]
    _, found = schedule(planner, steps=[10, 11, 28, 33, 34])  # ... and 29 to 32
    assert not plans_equal(found[2].plan, found[3].plan) and plans_equal(found[3].plan, found[4].plan)
    kinds, _ = schedule(planner, steps=[40, 41, 42])  # a partial range begins behind both searches
    assert kinds == ["observed", "sparse", "sparse"]


def test_late_first_search_and_unknown_steps_are_dense_with_a_reason():
    kinds, found = schedule(AdaSpa(block=8, search=(20,), dense_steps=5), steps=[4, 5, 19, 20, 21])
    assert kinds == ["dense", "dense", "dense", "observed", "sparse"]
    assert found[2].reason == "step 19 is before the first search (20)"
    for planner in (AdaSpa(), AdaSpa(dense_steps=0), AdaSpa(dense_steps=0, search=(0,))):
        assert "unknown" in planner.decide(layer(GRID, step=-1, num_steps=None))
    assert AdaSpa(dense_steps=0, search=(3,)).decide(layer(GRID, step=3, num_steps=None)) is None  # ids need no total


def test_noise_level_decides_where_the_number_of_steps_is_unknown():
    planner, state = AdaSpa(block=8), {}
    kinds, plans = [], []
    for step, sigma in enumerate((0.9, 0.81, 0.8, 0.5, 0.41, float(torch.tensor(0.4)), 0.1)):
        ctx = layer((2, 4, 8), step=step, num_steps=None, sigma=sigma, state=state)
        found, _ = call(planner, ctx, *draw(ctx))
        kinds.append(kind(found))
        plans.append(found.plan)
    assert kinds == ["dense"] * 2 + ["observed"] + ["sparse"] * 4
    assert [plans_equal(a, b) for a, b in itertools.pairwise(plans[3:])] == [True, False, True]


def test_search_beyond_the_schedule_is_an_error():
    planner = AdaSpa(search=(10, 30))
    with pytest.raises(ValueError, match="search step 30 is beyond the schedule of 30 steps"):
        planner.decide(layer(GRID, step=0, num_steps=30))
    assert "dense_steps" in planner.decide(layer(GRID, step=0, num_steps=31))


# ------------------------------------------------------------------ state
def test_layers_branches_experts_and_frame_blocks_are_apart():
    planner, state = AdaSpa(block=8, search=(0,), dense_steps=0), {}
    places = [{}, {"index": 1}, {"branch": 1}, {"expert": "transformer_2"}, {"frame_block": 3}]
    inputs = [draw(layer((2, 4, 8))) for _ in places]
    for place, x in zip(places, inputs, strict=True):
        assert kind(call(planner, layer((2, 4, 8), state=state, **place), *x)[0]) == "observed"
    for place, x in zip(places, inputs, strict=True):
        found, _ = call(planner, layer((2, 4, 8), step=1, state=state, **place), *draw(layer((2, 4, 8))))
        assert plans_equal(found.plan, planner.plan(*x[:2], layer((2, 4, 8))))


def test_changed_inputs_and_generations_search_anew():
    planner = AdaSpa(block=8, search=(0,), dense_steps=0)
    base = layer((2, 4, 8))
    for other, batch, heads in (
        (layer((2, 4, 8), generation=1), 1, 2),
        (layer((4, 4, 4)), 1, 2),
        (base, 2, 2),
        (base, 1, 4),
    ):
        state = {}
        ctx = layer((2, 4, 8), state=state)
        call(planner, ctx, *draw(ctx))
        again = layer(other.grid, step=1, state=state, generation=other.step.generation)
        assert kind(call(planner, again, *draw(again, heads, 16, batch))[0]) == "observed"


def test_two_generations_are_equal():
    planner, outs = AdaSpa(block=8), []
    inputs = [draw(layer((2, 4, 8), 5), 4) for _ in range(6)]
    for state in ({}, {}):
        outs.append(
            [call(planner, layer((2, 4, 8), 5, step=i, num_steps=6, state=state), *x)[1] for i, x in enumerate(inputs)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_memory_is_what_the_docstring_says():
    planner, state = AdaSpa(block=16), {}
    ctx = layer((5, 8, 16), 30, step=10, state=state)
    q, k, v = draw(ctx, 3, 8, 2)
    call(planner, ctx, q, k, v)
    found, n = remembered(state), 40
    assert found.lists.untyped_storage().nbytes() == 2 * 3 * n * math.ceil(n / 32) * 4
    assert found.lse.untyped_storage().nbytes() == 2 * 3 * ctx.n_video * 4
    call(planner, layer((5, 8, 16), 30, step=30, state=state), q, k, v)
    found = remembered(state)
    assert found.searches == 2 and found.lse is None  # no search is left that would use it


# ------------------------------------------------------------------ batches, padding, values
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (13, False), (13, True)])
def test_batch_items_are_searched_alone_with_their_own_padding(text, text_first):
    planner, kv_len = AdaSpa(block=16, search=(0, 1), dense_steps=0), torch.tensor([250, 301])
    ctx = layer(GRID, text, text_first, kv_len=kv_len)
    q, k, v = draw(ctx, 4, 16, 2, kv_heads=2)
    mass = planner.mass(q, k, attention(q, k, v, kv_len=kv_len, return_lse=True)[1][:, :, ctx.video_slice], ctx)
    torch.testing.assert_close(mass.double(), exact_mass(q, k, ctx, 16, kv_len), atol=1e-5, rtol=1e-5)
    states = {}, {}, {}
    for step in range(2):
        both = call(planner, layer(GRID, text, text_first, step=step, kv_len=kv_len, state=states[0]), q, k, v)
        for b in range(2):
            alone = layer(GRID, text, text_first, step=step, kv_len=kv_len[b : b + 1], state=states[1 + b])
            found, out = call(planner, alone, *(x[b : b + 1] for x in (q, k, v)))
            assert kind(found) == kind(both[0])
            assert found.plan is None or torch.equal(found.plan.to_mask()[0], both[0].plan.to_mask()[b])
            torch.testing.assert_close(out[0], both[1][b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", [0, 13])
@pytest.mark.parametrize("garbage", [1e4, math.nan])
def test_padding_never_changes_real_rows(text, garbage):
    planner, kv_len = AdaSpa(block=16, search=(0, 1), dense_steps=0), torch.tensor([200, 315 + text])
    states, outs, lists = ({}, {}), ([], []), ([], [])
    for step in range(3):
        ctx = [layer(GRID, text, step=step, kv_len=kv_len, state=state) for state in states]
        clean = draw(ctx[0], 4, 16, 2)
        dirty = [x.clone() for x in clean]
        for x in dirty:
            x[0, 200:] = garbage
        for i, x in enumerate((clean, dirty)):
            outs[i].append(call(planner, ctx[i], *x)[1])
            lists[i].append(_unpack(remembered(states[i]).lists))
    blocks = torch.arange(20) * 16 < 200  # those with a real token
    for a, b in zip(*lists, strict=True):
        assert torch.equal(a[0][:, blocks], b[0][:, blocks]) and torch.equal(a[1], b[1])
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a[0, :200], b[0, :200]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_and_strided_views_are_searched_in_fp32(dtype):
    planner, ctx = AdaSpa(block=16), layer(GRID, 13)
    joined = torch.randn(1, ctx.num_tokens, 3 * 2 * 16).to(dtype)  # fused qkv: q and k are strided views
    q, k = (joined[..., i * 32 : (i + 1) * 32].unflatten(-1, (2, 16)) for i in range(2))
    assert torch.equal(planner.plan(q, k, ctx).to_mask(), planner.plan(q.float(), k.float(), ctx).to_mask())


def test_gradients_and_inference_mode():
    planner, state = AdaSpa(block=8, search=(0, 2), dense_steps=0), {}
    ctx = [layer((2, 4, 8), step=i, state=state) for i in range(3)]
    with torch.inference_mode():
        call(planner, ctx[0], *draw(ctx[0]))
    for i in (1, 2):  # reuse, then a search with the kept log-sum-exp, while gradients are recorded
        q, k, v = (x.requires_grad_() for x in draw(ctx[i]))
        found, out = call(planner, ctx[i], q, k, v)
        assert not any(t is not None and (t.requires_grad or t.is_inference()) for t in found.plan.op_args())
        out.sum().backward()
        assert q.grad is not None and k.grad is not None and v.grad is not None
    with torch.no_grad():
        assert kind(call(planner, ctx[2], q, k, v)[0]) == "sparse"


@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_nothing_is_read_back(text, text_first):
    """On the meta device there are no values: a host read is an error."""
    planner, state, kv_len = AdaSpa(block=16, sinks=1), {}, torch.full((2,), 300, device="meta")
    x = torch.empty(2, 315 + text, 4, 16, device="meta")
    for step in (10, 11, 30, 31):
        ctx = layer(GRID, text, text_first, step=step, kv_len=kv_len, state=state)
        found = planner.decision(x, x, x, ctx)
        assert kind(found) == ("observed" if step == 10 else "sparse")
        if found.observe is not None:
            found.observe(x, torch.empty(2, 4, 315 + text, device="meta"))


def test_nearer_to_dense_than_chance_and_more_so_with_density(smooth):
    ctx = layer((6, 12, 12))
    q, k, v = smooth(ctx.grid, 2, 16, 2.0, 0)
    dense = attention(q, k, v)

    def error(planner, *other):
        plan = planner.plan(*(other or (q, k)), ctx)
        return float((attention(q, k, v, plan) - dense).norm() / dense.norm())

    errors = [error(AdaSpa(sparsity=s, block=16)) for s in (0.95, 0.8, 0.6, 0.4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.5 * error(AdaSpa(block=16), torch.randn_like(q), torch.randn_like(k))


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": math.nan}, "sparsity"),
        ({"sparsity": 0.3}, "head_adaptive"),
        ({"sparsity": "0.8"}, "sparsity"),
        ({"block": 0}, "block"),
        ({"block": 64.0}, "block"),
        ({"search": ()}, "search"),
        ({"search": 10}, "search"),
        ({"search": "10"}, "search"),
        ({"search": (30, 10)}, "search must increase"),
        ({"search": (10, 10)}, "search must increase"),
        ({"search": (10, 0.6)}, "not both"),
        ({"search": (0.2, 1.0)}, r"search\[1\]"),
        ({"search": (-1,)}, r"search\[0\]"),
        ({"search": (True,)}, r"search\[0\]"),
        ({"head_adaptive": 1}, "head_adaptive"),
    ],
)
def test_bad_settings_name_the_knob(knobs, words):
    with pytest.raises((ValueError, TypeError), match=words):
        AdaSpa(**knobs)


@pytest.mark.parametrize(
    "planner",
    [
        AdaSpa(),
        AdaSpa(sparsity=0.2, head_adaptive=False, search=(0,), block=128, dense_steps=3),
        AdaSpa(search=(0, 0.5)),
    ],
)
def test_dict_form_survives_json(planner):
    again = from_dict(json.loads(json.dumps(planner.to_dict())))
    assert again == planner and hash(again) == hash(planner) and type(again.search[0]) is type(planner.search[0])


def test_inputs_must_fit_the_context():
    ctx = layer(GRID, step=20)
    with pytest.raises(ValueError, match="300 tokens"):
        AdaSpa().decision(*torch.randn(3, 1, 300, 2, 16).unbind(), ctx)
