"""Re-ttention: the window, what caching steps measure, the schedule, memory, padding, state."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_calls import ODD_GRIDS, TEXTS, call, dense_weights, draw, kind, layer

import vdit_fast
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners import Rettention, from_dict
from vdit_fast.planners._tokens import cut
from vdit_fast.planners.rettention import TILE_ROWS
from vdit_fast.reference import attention

GRID = (5, 7, 9)


def window_mask(planner, ctx):
    """bool [N, N] from the definition, and the video part token by token, without text and sinks."""
    frames, height, width = ctx.grid
    place, frame = torch.arange(ctx.n_video) % (height * width), torch.arange(ctx.n_video) // (height * width)
    half = height * width if planner.window == 1 else int(planner.window * height * width) // 2
    piece = torch.tensor([i for i, n in enumerate(cut(height * width, max(1, TILE_ROWS // frames))) for _ in range(n)])
    near = (place[:, None] - place).abs() <= half  # per token; a tile reads the union of its tokens' windows
    tile = torch.stack([near[piece[place] == i].any(0) for i in range(int(piece.max()) + 1)])
    want = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
    want[ctx.video_slice, ctx.video_slice] = tile[piece[place]] | (frame < planner.sinks)
    return want, near


def remembered(state):
    """What the only layer keeps."""
    (found,) = [x for key, x in state.items() if key[0] == "rettention"]
    return found


# ------------------------------------------------------------------ window
@pytest.mark.parametrize("grid", [*ODD_GRIDS, (40, 6, 7), (130, 2, 3), (3, 30, 26)])
@pytest.mark.parametrize(("text", "text_first"), [*TEXTS, (150, True)])
@pytest.mark.parametrize("sinks", [0, 1])
def test_window_is_the_band_of_in_frame_indices_in_all_frames(grid, text, text_first, sinks):
    planner, ctx = Rettention(window=0.2, sinks=sinks), layer(grid, text, text_first)
    plan = planner.plan(*draw(ctx)[:2], ctx).validate()
    want, near = window_mask(planner, ctx)
    mask = plan.to_mask()[0, 0]
    assert plan.shape[:2] == (1, 1) and torch.equal(mask, want)
    assert (mask[ctx.video_slice, ctx.video_slice] | ~near).all()  # nobody misses a token of its own window
    # a video tile reads one run of keys, and one more for each of: text, sinks, unless they touch it
    runs = (plan.run_ptr[1:] - plan.run_ptr[:-1]).max()
    assert runs <= 1 + bool(text) + bool(sinks)


def test_density_of_the_papers_setting():
    ctx = layer((13, 30, 45), 226, True)
    plan = Rettention().plan(torch.empty(1, ctx.num_tokens, 1, 8), torch.empty(1, ctx.num_tokens, 1, 8), ctx)
    half = int(1350 * 0.03125) // 2
    assert half == 21
    video = (plan.density * ctx.num_tokens**2 - 2 * 226 * ctx.n_video - 226**2) / ctx.n_video**2
    assert 43 / 1350 - 0.001 < video < 0.040  # 3.2 % per token, a little more for whole tiles


@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_whole_frame_and_all_sinks_are_dense(text, text_first):
    ctx = layer(GRID, text, text_first)
    for planner in (Rettention(window=1.0), Rettention(window=0.0, sinks=5), Rettention(window=0.0, sinks=9)):
        assert planner.plan(*draw(ctx)[:2], ctx).validate().density == 1
    alone = Rettention(window=0.0).plan(*draw(layer((64, 2, 3)))[:2], layer((64, 2, 3)))
    assert alone.density == pytest.approx(2 / 6)  # tiles of two places, which read themselves in all frames


# ------------------------------------------------------------------ caching steps
@pytest.mark.parametrize("grid", ODD_GRIDS)
@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_scaled_window_plus_residual_is_dense(grid, text, text_first):
    planner, state = Rettention(window=0.2, dense_steps=0), {}
    ctx = layer(grid, text, text_first, state=state)
    q, k, v = draw(ctx, 4, 16, 2, kv_heads=2)
    found, out = call(planner, ctx, q, k, v)
    assert kind(found) == "observed" and "measures" in found.reason
    exact = attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    kept = remembered(state)
    again = vdit_fast.attention(q, k, v, planner.plan(q, k, ctx), row_scale=kept.rho) + kept.residual
    torch.testing.assert_close(again, out, atol=2e-6, rtol=2e-6)
    # rho is the window's share of the exact weights, R what the other keys contribute
    weights, mask = dense_weights(q, k), planner.plan(q, k, ctx).to_mask()
    torch.testing.assert_close(kept.rho.double(), (weights * mask).sum(-1), atol=1e-6, rtol=1e-5)
    values = v.double().repeat_interleave(2, 2)
    outside = torch.einsum("bhqk,bkhd->bqhd", weights * ~mask, values)
    torch.testing.assert_close(kept.residual.double(), outside, atol=1e-6, rtol=1e-5)
    assert kept.rho.dtype == torch.float32 and kept.residual.dtype == out.dtype
    if text:  # text rows read everything
        torch.testing.assert_close(kept.rho[..., ctx.text_slice], torch.ones_like(kept.rho[..., ctx.text_slice]))


def test_window_and_the_rest_merge_to_dense():
    planner, ctx = Rettention(window=0.2), layer(GRID, 13)
    q, k, v = draw(ctx, 2, 16, 2)
    inside = planner.plan(q, k, ctx)
    outside = AttentionPlan.from_mask(~inside.to_mask())
    parts = [vdit_fast.attention(q, k, v, plan, return_lse=True) for plan in (inside, outside)]
    out, lse = vdit_fast.attention(q, k, v, return_lse=True)
    merged, merged_lse = vdit_fast.merge([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(merged, out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged_lse, lse, atol=1e-6, rtol=1e-6)
    rho, residual = planner.measure(q, k, v, out, lse, ctx)
    share = (1 - rho).transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(residual, share * parts[1][0], atol=2e-6, rtol=2e-5)


def test_nothing_dropped_means_rho_one_and_no_residual():
    planner, state = Rettention(window=1.0, dense_steps=0, increment=0), {}
    ctx = layer(GRID, 13, state=state)
    q, k, v = draw(ctx)
    call(planner, ctx, q, k, v)
    kept = remembered(state)
    torch.testing.assert_close(kept.rho, torch.ones_like(kept.rho), atol=1e-6, rtol=0)
    assert kept.residual.abs().max() < 1e-6
    # so a sparse step is plain attention under the plan
    later = draw(ctx)
    _, out = call(planner, layer(GRID, 13, step=1, state=state), *later)
    torch.testing.assert_close(out, vdit_fast.attention(*later), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_constant_inputs_without_increment_reproduce_dense(text, text_first):
    planner, state = Rettention(window=0.1, increment=0, dense_steps=3, sinks=1), {}
    q, k, v = draw(layer(GRID, text, text_first), 2, 16, 2)
    dense = vdit_fast.attention(q, k, v)
    for step in range(14):
        found, out = call(planner, layer(GRID, text, text_first, step=step, state=state), q, k, v)
        assert kind(found) == ("dense" if step < 3 else "observed" if step in (3, 8, 13) else "sparse")
        torch.testing.assert_close(out, dense, atol=2e-6, rtol=2e-6)


def test_rho_grows_by_the_increment_after_use():
    planner, state = Rettention(window=0.2, dense_steps=0), {}
    ctx = layer(GRID, 13, True, state=state)
    q, k, v = draw(ctx, 2, 16, 2)
    call(planner, ctx, q, k, v)
    rho = remembered(state).rho.clone()
    for step in (1, 2, 4):  # step 3 was skipped by a cache: time goes on
        grown = rho.clone()
        grown[..., ctx.video_slice] += 0.04 * (step - 1)
        inputs = draw(ctx, 2, 16, 2)
        for _ in range(2):  # asking twice changes nothing
            found, out = call(planner, layer(GRID, 13, True, step=step, state=state), *inputs)
            torch.testing.assert_close(found.row_scale, grown, atol=1e-6, rtol=0)
        window = attention(*inputs, planner.plan(*inputs[:2], ctx))
        want = grown.transpose(1, 2)[..., None] * window + remembered(state).residual
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(remembered(state).rho, rho, atol=0, rtol=0)


def test_clamp():
    state = {}
    planner = Rettention(window=0.9, dense_steps=0, increment=0.2, clamp=True)
    free = Rettention(window=0.9, dense_steps=0, increment=0.2)
    x = draw(layer(GRID))
    for p in (planner, free):
        call(p, layer(GRID, state=state), *x)
    scale = [call(p, layer(GRID, step=4, state=state), *x)[0].row_scale for p in (planner, free)]
    assert scale[0].max() == 1 and scale[1].max() > 1 and torch.equal(scale[0], scale[1].clamp(max=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_residuals_keep_the_dtype_and_the_accuracy(dtype):
    planner, state = Rettention(window=0.2, dense_steps=0, increment=0), {}
    q, k, v = (x.to(dtype) for x in draw(layer(GRID, 13), 2, 16, 2))
    exact = attention(q.double(), k.double(), v.double())
    _, dense = call(planner, layer(GRID, 13, state=state), q, k, v)
    _, out = call(planner, layer(GRID, 13, step=1, state=state), q, k, v)
    assert remembered(state).residual.dtype == dtype == out.dtype
    # one more rounding for the window's part, one for R, one for the sum
    assert (out.double() - exact).norm() < 3 * (dense.double() - exact).norm()


# ------------------------------------------------------------------ schedule
def schedule(planner, num_steps=50, steps=None):
    state, found = {}, []
    for step in steps or range(num_steps):
        ctx = layer((2, 3, 4), step=step, num_steps=num_steps, state=state)
        found.append(call(planner, ctx, *draw(ctx, 1, 8))[0])
    return [kind(d) for d in found], found


def test_fifty_steps():
    for planner in (Rettention(), Rettention(dense_steps=15)):
        kinds, found = schedule(planner)
        assert kinds[:15] == ["dense"] * 15
        assert [i for i, what in enumerate(kinds) if what == "observed"] == [15, 20, 25, 30, 35, 40, 45]
        assert kinds.count("sparse") == 28
        assert all((d.reason is None) == (d.plan is not None) for d in found)


@pytest.mark.parametrize(
    ("knobs", "steps", "caching"),
    [
        ({"dense_steps": 10}, 50, list(range(10, 50, 5))),  # HunyuanDiT
        ({"dense_steps": 5}, 20, [5, 10, 15]),  # PixArt
        ({}, 12, [3, 8]),
        ({"dense_steps": 0, "interval": 1}, 4, [0, 1, 2, 3]),
        ({"dense_steps": 0, "interval": 99}, 4, [0]),
    ],
)
def test_other_schedules(knobs, steps, caching):
    kinds, _ = schedule(Rettention(**knobs), steps)
    assert [i for i, what in enumerate(kinds) if what == "observed"] == caching
    assert "dense" not in kinds[caching[0] :]


def test_missed_caching_steps_are_made_up_for():
    kinds, _ = schedule(Rettention(dense_steps=15), steps=[14, 16, 17, 22, 23])  # a cache skipped 15 and 18 to 21
    assert kinds == ["dense", "observed", "sparse", "observed", "sparse"]
    kinds, _ = schedule(Rettention(dense_steps=15), steps=[40, 41])  # a partial range
    assert kinds == ["observed", "sparse"]
    kinds, _ = schedule(Rettention(dense_steps=0), steps=[7, 8, 8, 7, 6])  # going back measures anew
    assert kinds == ["observed", "sparse", "sparse", "observed", "observed"]


def test_unknown_steps_are_dense_with_a_reason():
    for planner in (Rettention(), Rettention(dense_steps=0), Rettention(dense_steps=3)):
        ctx = layer(GRID, step=-1, num_steps=None)
        found, _ = call(planner, ctx, *draw(ctx))
        assert kind(found) == "dense" and "unknown" in found.reason
    sigma = layer(GRID, step=20, num_steps=None, sigma=0.5)
    assert Rettention().decide(sigma) is None


# ------------------------------------------------------------------ memory
def test_state_bytes_closed_form():
    wan = Rettention.state_bytes(75_600, 40, 128, layers=40)
    assert wan == 40 * (75_600 * 40 * 128 * 2 + 75_600 * 40 * 4) and round(wan / 1e9, 1) == 31.4
    cog = Rettention.state_bytes(17_776, 30, 64, layers=30, streams=2)
    assert round(cog / 2e9, 1) == 2.1


@given(batch=st.integers(1, 3), heads=st.integers(1, 4), dim=st.sampled_from([4, 16]), streams=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_state_bytes_are_what_is_kept(batch, heads, dim, streams):
    planner, state = Rettention(dense_steps=0), {}
    for branch in range(streams):
        for index in range(2):
            ctx = layer((2, 3, 4), 5, state=state, index=index, layers=2, branch=branch)
            call(planner, ctx, *draw(ctx, heads, dim, batch))
    kept = [x for key, x in state.items() if key[0] == "rettention"]
    held = sum(t.untyped_storage().nbytes() for x in kept for t in (x.rho, x.residual))
    assert held == Rettention.state_bytes(29, heads, dim, batch=batch, itemsize=4, layers=2, streams=streams)


def test_too_much_memory_is_refused_at_the_first_dense_step_with_what_would_fit():
    ctx = layer(GRID, 13, layers=6, index=2)
    q, k, v = draw(ctx, 4, 16, 2)
    each = Rettention.state_bytes(328, 4, 16, batch=2, itemsize=4)
    with pytest.raises(ValueError) as error:
        Rettention(max_bytes=4 * each + 7).decision(q, k, v, ctx)
    text = str(error.value)
    assert f"{6 * each:,} bytes" in text and f"max_bytes is {4 * each + 7:,}" in text and "4 layers fit" in text
    assert "dense_layers to 2" in text and not [key for key in ctx.state if key[0] == "rettention"]
    fits = Rettention(max_bytes=4 * each + 7, dense_layers=2)
    assert "dense_steps" in fits.decision(q, k, v, ctx).reason
    assert "dense_layers" in fits.decision(q, k, v, layer(GRID, 13, layers=6, index=1)).reason
    with pytest.raises(ValueError, match="not even one layer fits"):
        Rettention(max_bytes=each - 1).decision(q, k, v, ctx)
    small = Rettention(max_bytes=0, min_tokens=1000)  # never sparse, so it keeps nothing
    assert "min_tokens" in small.decision(q, k, v, ctx).reason


def test_the_second_branch_is_counted_before_it_keeps_anything():
    state, each = {}, Rettention.state_bytes(315, 2, 16, itemsize=4)
    planner = Rettention(max_bytes=7 * each)  # 4 layers of one branch, not of two
    x = draw(layer(GRID))
    planner.decision(*x, layer(GRID, state=state))
    for index in range(4):  # the same branch again, in every layer and step, is nothing new
        planner.decision(*x, layer(GRID, state=state, index=index, step=1))
    with pytest.raises(ValueError, match="2 branches"):
        planner.decision(*x, layer(GRID, state=state, branch=1))
    Rettention(max_bytes=8 * each).decision(*x, layer(GRID, state=state, branch=1))
    planner.decision(*x, layer(GRID, state=state, step=15))  # the refused one takes no place


# ------------------------------------------------------------------ state
def test_layers_branches_experts_and_frame_blocks_are_apart():
    planner, state = Rettention(dense_steps=0, increment=0, window=0.2), {}
    places = [{}, {"index": 1}, {"branch": 1}, {"expert": "transformer_2"}, {"frame_block": 3}]
    inputs = [draw(layer(GRID)) for _ in places]
    for place, x in zip(places, inputs, strict=True):
        assert kind(call(planner, layer(GRID, state=state, **place), *x)[0]) == "observed"
    for place, x in zip(places, inputs, strict=True):
        found, out = call(planner, layer(GRID, step=1, state=state, **place), *x)
        assert kind(found) == "sparse"
        torch.testing.assert_close(out, vdit_fast.attention(*x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("grid", "batch", "heads", "dtype", "generation"),
    [
        (GRID, 1, 2, torch.float32, 1),
        ((5, 9, 7), 1, 2, torch.float32, 0),
        (GRID, 2, 2, torch.float32, 0),
        (GRID, 1, 3, torch.float32, 0),
        (GRID, 1, 2, torch.bfloat16, 0),
    ],
)
def test_changed_inputs_and_generations_measure_anew(grid, batch, heads, dtype, generation):
    planner, state = Rettention(dense_steps=0), {}
    call(planner, layer(GRID, state=state), *draw(layer(GRID)))
    ctx = layer(grid, step=1, state=state, generation=generation)
    assert kind(call(planner, ctx, *(x.to(dtype) for x in draw(ctx, heads, 16, batch)))[0]) == "observed"


def test_a_caching_step_that_nobody_observed_is_repeated():
    planner, state = Rettention(dense_steps=0), {}
    q, k, v = draw(layer(GRID))
    assert planner.decision(q, k, v, layer(GRID, state=state)).observe is not None
    assert planner.decision(q, k, v, layer(GRID, step=1, state=state)).observe is not None
    call(planner, layer(GRID, step=2, state=state), q, k, v)
    assert planner.decision(q, k, v, layer(GRID, step=7, state=state)).observe is not None
    assert not [key for key in state if key[0] == "rettention"]  # freed before the new one is made


def test_two_generations_are_equal():
    planner, outs = Rettention(), []
    inputs = [draw(layer((2, 4, 8), 5)) for _ in range(12)]
    for _ in range(2):
        state = {}
        contexts = [layer((2, 4, 8), 5, step=i, num_steps=12, state=state) for i in range(12)]
        outs.append([call(planner, ctx, *x)[1] for ctx, x in zip(contexts, inputs, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# ------------------------------------------------------------------ batches, padding, values
@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_batch_items_are_measured_alone_with_their_own_padding(text, text_first):
    planner, kv_len = Rettention(dense_steps=0, window=0.2), torch.tensor([250, 301])
    q, k, v = draw(layer(GRID, text, text_first), 4, 16, 2, kv_heads=2)
    states = {}, {}, {}
    for step in range(3):
        ctx = layer(GRID, text, text_first, step=step, kv_len=kv_len, state=states[0])
        both, out = call(planner, ctx, q, k, v)
        if step == 0:
            exact = attention(q.double(), k.double(), v.double(), kv_len=kv_len)
            torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
        for b in range(2):
            alone = layer(GRID, text, text_first, step=step, kv_len=kv_len[b : b + 1], state=states[1 + b])
            found, single = call(planner, alone, *(x[b : b + 1] for x in (q, k, v)))
            assert kind(found) == kind(both)
            torch.testing.assert_close(single[0], out[b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text", [0, 13])
@pytest.mark.parametrize("garbage", [1e4, math.nan])
def test_padding_never_changes_real_rows(text, garbage):
    planner, kv_len = Rettention(dense_steps=0, window=0.2), torch.tensor([200, 315 + text])
    states = {}, {}
    for step in range(3):
        ctx = [layer(GRID, text, step=step, kv_len=kv_len, state=state) for state in states]
        clean = draw(ctx[0], 4, 16, 2)
        dirty = [x.clone() for x in clean]
        for x in dirty:
            x[0, 200:] = garbage
        (_, a), (_, b) = (call(planner, c, *x) for c, x in zip(ctx, (clean, dirty), strict=True))
        assert torch.equal(a[0, :200], b[0, :200]) and torch.equal(a[1], b[1])


def test_rows_without_keys_stay_zero():
    planner, state = Rettention(dense_steps=0, window=0.2), {}
    kv_len = torch.tensor([0, 40])  # nothing at all; windows that are empty although the row has keys
    for step in range(3):
        ctx = layer(GRID, step=step, kv_len=kv_len, state=state)
        _, out = call(planner, ctx, *draw(ctx, 2, 16, 2))
        assert out.isfinite().all() and (out[0] == 0).all()


def test_gradients_and_inference_mode():
    planner, state = Rettention(dense_steps=0, window=0.2), {}
    with torch.inference_mode():
        plan = planner.plan(*draw(layer(GRID))[:2], layer(GRID, state=state))
        assert not any(t is not None and t.is_inference() for t in plan.op_args())
        call(planner, layer(GRID, state=state), *draw(layer(GRID)))
    for step in (1, 2):
        q, k, v = (x.requires_grad_() for x in draw(layer(GRID)))
        found, out = call(planner, layer(GRID, step=step, state=state), q, k, v)
        assert kind(found) == "sparse" and not found.row_scale.requires_grad and not found.residual.requires_grad
        out.sum().backward()
        want = torch.autograd.grad((attention(q, k, v, found.plan, row_scale=found.row_scale)).sum(), (q, k, v))
        for x, g in zip((q, k, v), want, strict=True):
            torch.testing.assert_close(x.grad, g, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert kind(call(planner, layer(GRID, step=3, state=state), q, k, v)[0]) == "sparse"


@pytest.mark.parametrize(("text", "text_first"), TEXTS)
def test_nothing_is_read_back(text, text_first):
    """On the meta device there are no values: a host read is an error."""
    planner, state, kv_len = Rettention(dense_steps=0, sinks=1, clamp=True), {}, torch.full((2,), 300, device="meta")
    x = torch.empty(2, 315 + text, 4, 16, device="meta")
    for step in range(4):
        ctx = layer(GRID, text, text_first, step=step, kv_len=kv_len, state=state)
        found = planner.decision(x, x, x, ctx)
        assert kind(found) == ("observed" if step == 0 else "sparse")
        assert found.plan is None or found.plan.device.type == "meta"
        if found.observe is not None:
            found.observe(x, torch.empty(2, 4, 315 + text, device="meta"))


def test_completion_beats_the_bare_window_while_inputs_drift(smooth):
    """What the method is for: the window alone, its rows scaled, and both with the residual."""
    ctx = layer((6, 12, 12))
    planner, state = Rettention(dense_steps=0, window=0.1, increment=0), {}
    q, k, v = smooth(ctx.grid, 2, 16, 1.0, 0)
    call(planner, layer(ctx.grid, state=state), q, k, v)
    later = [x + 0.1 * torch.randn_like(x) for x in (q, k, v)]
    dense = attention(*later)
    found, out = call(planner, layer(ctx.grid, step=1, state=state), *later)
    bare = (attention(*later, found.plan) - dense).norm()
    assert (out - dense).norm() < 0.5 * bare


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"window": 1.5}, "window"),
        ({"window": -0.1}, "window"),
        ({"window": math.nan}, "window"),
        ({"window": "0.1"}, "window"),
        ({"interval": 0}, "interval"),
        ({"interval": 2.5}, "interval"),
        ({"increment": -0.04}, "increment"),
        ({"increment": math.inf}, "increment"),
        ({"clamp": 1}, "clamp"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"max_bytes": 8e9}, "max_bytes"),
    ],
)
def test_bad_settings_name_the_knob(knobs, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Rettention(**knobs)


@pytest.mark.parametrize(
    "planner", [Rettention(), Rettention(window=1, interval=3, increment=0, clamp=True, max_bytes=5, dense_steps=3)]
)
def test_dict_form_survives_json(planner):
    again = from_dict(json.loads(json.dumps(planner.to_dict())))
    assert again == planner and hash(again) == hash(planner)


def test_inputs_must_fit_the_context():
    with pytest.raises(ValueError, match="300 tokens"):
        Rettention().decision(*torch.randn(3, 1, 300, 2, 16).unbind(), layer(GRID, step=20))


@pytest.mark.parametrize("interval", [3, 1])
def test_finished_frame_blocks_are_freed(interval):
    """Streaming: the last step of a block frees its tensors and its share of max_bytes, whatever its layers' order."""
    each = Rettention.state_bytes(GRID[0] * GRID[1] * GRID[2], 2, 16, itemsize=4, layers=4)
    planner, state = Rettention(dense_steps=0, interval=interval, max_bytes=each), {}  # room for one block at a time
    for block in range(3):
        for step in range(5):
            for index in range(4):
                ctx = layer(GRID, index=index, step=step, num_steps=5, frame_block=block, state=state)
                call(planner, ctx, *draw(ctx, 2, 16))
            kept = [key for key in state if key[0] == "rettention"]
            assert len(kept) == (0 if step == 4 else 4)
