"""What the five peer methods share: full budgets, text, sinks, padding, heads, batches, odd grids, dict form."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vdit_fast
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import VSA, Radial, SlidingTile, Sparge, XAttention, from_dict
from vdit_fast.reference import attention

GRID = (5, 7, 9)
PEERS = {
    "radial": lambda **kw: Radial(**{"decay": 0.1, "block": 8, "sinks": 0, **kw}),
    "sliding_tile": lambda **kw: SlidingTile(**{"tile": (2, 3, 4), "sparsity": 0.7, **kw}),
    "vsa": lambda **kw: VSA(**{"cube": (2, 3, 4), "sparsity": 0.7, **kw}),
    "sparge": lambda **kw: Sparge(**{"block": (32, 16), "sparsity": 0.7, **kw}),
    "sparge top_p": lambda **kw: Sparge(**{"block": (32, 16), "top_p": 0.5, "similarity": 0.035, **kw}),
    "xattention": lambda **kw: XAttention(**{"block": 32, "stride": 4, "top_p": 0.4, **kw}),
}
FULL = {
    "radial": {"decay": 1e3, "thinning": False},
    "sliding_tile": {"sparsity": 0},
    "vsa": {"sparsity": 0},
    "sparge": {"sparsity": 0},
    "sparge top_p": {"top_p": 1},
    "xattention": {"top_p": 1},
}
MEASURED = ("vsa", "sparge", "sparge top_p", "xattention")  # the plan depends on q and k
each = pytest.mark.parametrize("name", PEERS)
measured = pytest.mark.parametrize("name", MEASURED)


def random(ctx, heads=2, dim=8, batch=1):
    return (2 * torch.randn(3, batch, ctx.num_tokens, heads, dim)).unbind()


@each
@pytest.mark.parametrize("grid", [GRID, (4, 6, 8), (1, 1, 1), (1, 13, 1), (7, 1, 2)])
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (5, False), (131, True)])
def test_full_budget_is_dense(context, name, grid, text, text_first):
    ctx = context(grid, text, text_first=text_first)
    q, k, v = random(ctx, dim=16)
    plan = PEERS[name](**FULL[name]).plan(q, k, ctx).validate()
    assert plan.density == 1
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), attention(q, k, v), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (5, False), (131, True)])
def test_text_and_sinks_are_kept_on_top(context, name, text, text_first):
    ctx = context(GRID, text, text_first=text_first)
    q, k, v = random(ctx, dim=16)
    plain, plan = (PEERS[name](sinks=sinks).plan(q, k, ctx).validate() for sinks in (0, 2))
    assert plain.density < 1
    mask, video = plan.to_mask(), ctx.video_slice
    assert mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    assert mask[..., video.start : video.start + 2 * 7 * 9].all() and not mask.all()
    assert (mask >= plain.to_mask()).all()
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), attention(q, k, v, plan), rtol=1e-4, atol=1e-5)


@measured
def test_text_changes_nothing_for_the_video(context, name):
    alone, last, first = context(GRID), context(GRID, 6), context(GRID, 6, text_first=True)
    q, k, _ = random(alone)
    want = PEERS[name]().plan(q, k, alone).to_mask()
    for ctx in (last, first):
        more = [torch.randn(1, 6, 2, 8) * 50 for _ in range(2)]
        joined = [torch.cat([t, x] if ctx.text_first else [x, t], 1) for t, x in zip(more, (q, k), strict=True)]
        got = PEERS[name]().plan(*joined, ctx).to_mask()
        assert torch.equal(got[..., ctx.video_slice, ctx.video_slice], want)


@measured
def test_batch_items_and_heads_get_their_own_masks(context, name):
    ctx = context(GRID, 4, kv_len=torch.tensor([319, 200]))
    q, k, _ = random(ctx, heads=3, batch=2)
    mask = PEERS[name]().plan(q, k, ctx).to_mask()
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[0, 0], mask[0, 1])
    for b in range(2):
        one = context(GRID, 4, kv_len=ctx.kv_len[b : b + 1])
        assert torch.equal(PEERS[name]().plan(q[b : b + 1], k[b : b + 1], one).to_mask()[0], mask[b])


@each
def test_grouped_key_heads(context, name):
    ctx = context(GRID, 3)
    q, k, _ = random(ctx, heads=4)
    k = k[:, :, :2]
    repeated = PEERS[name]().plan(q, k.repeat_interleave(2, 2), ctx).to_mask()
    assert torch.equal(PEERS[name]().plan(q, k, ctx).to_mask(), repeated)


@measured
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_and_strided_views(context, name, dtype):
    ctx, planner = context(GRID), PEERS[name]()
    joined = torch.randn(1, ctx.num_tokens, 3 * 2 * 16).to(dtype)  # fused qkv: q and k are strided views
    q, k = (joined[..., i * 32 : (i + 1) * 32].unflatten(-1, (2, 16)) for i in range(2))
    assert torch.equal(planner.plan(q, k, ctx).to_mask(), planner.plan(q.float(), k.float(), ctx).to_mask())


@each
def test_density_falls_with_the_knob(context, smooth, name):
    knob, values = {
        "radial": ("decay", (1e3, 0.6, 0.3, 0.0)),
        "sparge top_p": ("top_p", (1.0, 0.9, 0.5, 0.0)),
        "xattention": ("top_p", (1.0, 0.9, 0.5, 0.0)),
    }.get(name, ("sparsity", (0.0, 0.3, 0.6, 0.95)))
    q, k, _ = smooth((6, 12, 12), 2, 16, 2.0, 0)
    found = [PEERS[name](**{knob: x}).plan(q, k, context((6, 12, 12))).density for x in values]
    assert all(a > b for a, b in itertools.pairwise(found)), found


@each
def test_same_inputs_same_plan_and_geometry_is_not_mixed_up(context, name):
    ctx = context(GRID, 4)
    q, k, _ = random(ctx)
    planner = PEERS[name]()
    first, cached = planner.plan(q, k, ctx), planner.plan(q, k, ctx)
    fresh = PEERS[name]().plan(q, k, context(GRID, 4))
    for a, b, c in zip(first.op_args(), cached.op_args(), fresh.op_args(), strict=True):
        assert a is None or (torch.equal(a, b) and torch.equal(a, c))
    # another grid of as many tokens, and text on the other side, with the same memory
    for other in ({"grid": (7, 5, 9)}, {"text_first": True}):
        more = context(other.pop("grid", GRID), 4, static=ctx.static, **other)
        alone = context(more.grid, 4, text_first=more.text_first)
        assert torch.equal(planner.plan(q, k, more).to_mask(), planner.plan(q, k, alone).to_mask())


@each
def test_nothing_is_read_back_to_the_host(context, name):
    """Tensors without data: every look at a value on the device raises."""
    q, k, v = torch.empty(3, 2, 315 + 6, 2, 16, device="meta").unbind()
    knobs = {"gate": 1.0} if name == "vsa" else {}
    for kv_len in (None, torch.empty(2, dtype=torch.int32, device="meta")):
        assert (
            PEERS[name](sinks=1, **knobs).decision(q, k, v, context(GRID, 6, kv_len=kv_len)).plan.device.type == "meta"
        )


@each
def test_plan_of_inference_mode_serves_a_backward(context, name):
    ctx, planner = context(GRID), PEERS[name]()
    q, k, v = random(ctx, dim=16)
    with torch.inference_mode():
        planner.plan(q, k, ctx)
    q.requires_grad_()
    vdit_fast.attention(q, k, v, planner.plan(q, k, ctx)).sum().backward()
    assert q.grad.isfinite().all()


@each
def test_nan_query_spoils_only_what_dense_attention_spoils(context, name):
    ctx = context(GRID)
    q, k, v = random(ctx)
    q[0, 100] = math.nan
    out = attention(q, k, v, PEERS[name]().plan(q, k, ctx))
    assert torch.equal(out.isnan(), attention(q, k, v).isnan()) and out.isnan().any()


@each
def test_common_knobs_and_dict_form(context, name):
    planner = PEERS[name](dense_steps=3, dense_layers=(0, -1), min_tokens=200, sinks=1)
    again = from_dict(json.loads(json.dumps(planner.to_dict())))
    assert again == planner and hash(again) == hash(planner)
    ctx = context(GRID)
    q, k, v = random(ctx)
    decision = planner.decision(q, k, v, ctx)
    assert decision.plan is None and decision.residual is None and "dense_layers" in decision.reason
    late = context(GRID, layer=1, step=StepContext(step=3, num_steps=10))
    assert planner.decision(q, k, v, late).reason is None
    with pytest.raises(ValueError, match="315 tokens"):
        planner.plan(q, k, context(GRID, 1))


@pytest.mark.parametrize(
    ("cls", "knobs", "name"),
    [
        (Radial, {"decay": -0.1}, "decay"),
        (Radial, {"decay": math.inf}, "decay"),
        (Radial, {"decay": "0.2"}, "decay"),
        (Radial, {"thinning": 1}, "thinning"),
        (Radial, {"block": 0}, "block"),
        (SlidingTile, {"window": (3, 3)}, "window"),
        (SlidingTile, {"window": (3, 3, -1)}, r"window\[2\]"),
        (SlidingTile, {"window": ()}, "window"),
        (SlidingTile, {"window": ((3, 3, 3), (3, 3))}, r"window\[1\]"),
        (SlidingTile, {"window": ((3, 3, 3), 3)}, "window"),
        (SlidingTile, {"window": (((3, 3, 3), (1, 1, 1.5)),)}, r"window\[0\]\[1\]\[2\]"),
        (SlidingTile, {"window": 3}, "window"),
        (SlidingTile, {"tile": (6, 8)}, "tile"),
        (SlidingTile, {"sparsity": 1}, "sparsity"),
        (VSA, {"sparsity": 1.0}, "sparsity"),
        (VSA, {"cube": (0, 4, 4)}, r"cube\[0\]"),
        (VSA, {"gate": math.nan}, "gate"),
        (VSA, {"gate": True}, "gate"),
        (Sparge, {"sparsity": -1}, "sparsity"),
        (Sparge, {"top_p": 1.1}, "top_p"),
        (Sparge, {"similarity": 1.0}, "similarity"),
        (Sparge, {"block": 128}, "block"),
        (XAttention, {"top_p": -0.1}, "top_p"),
        (XAttention, {"top_p": None}, "top_p"),
        (XAttention, {"stride": 0}, "stride"),
        (XAttention, {"block": 100}, "block 100 is not a multiple of stride 8"),
    ],
)
def test_bad_settings_name_the_knob(cls, knobs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        cls(**knobs)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(PEERS)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 7),
    padded=st.integers(0, 30),
)
def test_any_shape_gives_a_valid_plan_without_empty_rows(name, grid, text, text_first, sinks, padded):
    n_video = math.prod(grid)
    kv_len = torch.tensor([max(1, n_video + text - padded)]) if padded else None
    ctx = LayerContext(0, 1, "a", grid, n_video, text, text_first, kv_len)
    q, k, _ = random(ctx, dim=4)
    mask = PEERS[name](sinks=sinks).plan(q, k, ctx).validate().to_mask()
    assert mask.any(-1).all()
    assert mask[..., ctx.text_slice].all() and mask[:, :, ctx.text_slice].all()
    assert mask[..., ctx.video_slice][..., : sinks * grid[1] * grid[2]].all()
