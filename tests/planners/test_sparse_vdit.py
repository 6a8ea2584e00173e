"""Sparse-vDiT planner: masks of the modes, one launch for all heads, the table's forms, and where it refuses."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_calls import plans_equal

import vdit_fast
from vdit_fast.config import Config
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners import SparseVDiT, from_dict, sparse_vdit
from vdit_fast.planners._mode_runs import HeadRuns, Layout, join
from vdit_fast.planners.sparse_vdit import token_major

GRID = (5, 6, 7)  # 210 tokens, 42 per frame: no multiple of any block below
MADE = {"family": "wan", "layers": 4, "heads": 2, "grid": [5, 6, 7], "text": 0, "steps": 10}


def random(ctx, heads=2, dim=8, batch=1):
    return torch.randn(3, batch, ctx.num_tokens, heads, dim).unbind()


def mask_of(planner, ctx, heads=2):
    q, k, _ = random(ctx, heads)
    plan = planner.plan(q, k, ctx).validate()
    return plan.to_mask().expand(1, heads, -1, -1)[0]


def band_mask(planner, ctx, major):
    """bool [n_video, n_video] token by token from the definition."""
    frames, height, width = ctx.grid
    fs, sinks, block, w = height * width, min(planner.sinks, frames), planner.block, planner.width(ctx)
    t, place = torch.arange(frames).repeat_interleave(fs), torch.arange(fs).repeat(frames)
    late_frames = frames - sinks
    if major == "frame":
        q_at, k_at, scale, shift = t * fs + place, (t - sinks) * fs + place, 1.0, sinks * fs
    else:
        q_at, k_at = place * frames + t, place * late_frames + t - sinks
        scale, shift = frames / max(late_frames, 1), 0
    q_lo, k_lo = q_at // block * block, k_at // block * block
    q_hi, k_hi = (q_lo + block).clamp(max=ctx.n_video), (k_lo + block).clamp(max=late_frames * fs)
    k_lo, k_hi = k_lo * scale + shift, k_hi * scale + shift
    near = ((q_lo + q_hi)[:, None] / 2 - (k_lo + k_hi) / 2).abs() <= w + 1e-6
    keep = near | ((q_lo[:, None] < k_hi) & (k_lo < q_hi[:, None]))
    return keep | (t < sinks)


# ---------------------------------------------------------------------- what the modes read
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (9, False), (9, True)])
@pytest.mark.parametrize("sinks", [0, 1, 2, 9])
def test_masks_are_the_definition(context, text, text_first, sinks):
    ctx = context(GRID, text, text_first=text_first)
    planner = SparseVDiT(modes="dmvfs", sparsity=0.8, block=16, sinks=sinks, stripes={"0.2": "0"} if sinks < 9 else {})
    mask = mask_of(planner, ctx, 5)
    early = min(sinks, 5) * 42
    columns = torch.arange(210) < max(early, min(early + 16, 210))
    video = [band_mask(planner, ctx, "frame"), band_mask(planner, ctx, "token"), columns.expand(210, -1)]
    for head, want_video in enumerate(video):
        want = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
        want[ctx.video_slice, ctx.video_slice] = want_video
        assert torch.equal(mask[head], want), head
    assert mask[3].all() and not mask[4].any()


def test_token_major_order():
    ctx = LayerContext(0, 1, "a", (3, 1, 4), 12, 2, True)
    assert token_major(ctx, 0, torch.device("cpu")).tolist() == [[[0, 1, 2, 6, 10, 3, 7, 11, 4, 8, 12, 5, 9, 13]]]
    assert token_major(ctx, 1, torch.device("cpu")).tolist() == [[[0, 1, 2, 3, 4, 5, 6, 10, 7, 11, 8, 12, 9, 13]]]


@pytest.mark.parametrize(
    ("grid", "text", "sparsity", "frames"),
    [  # sheet of Sparse VideoGen's closed form: Wan 720p, HunyuanVideo 720p, CogVideoX 1.5
        ((21, 45, 80), 0, 0.75, 2.8135),
        ((21, 45, 80), 0, 0.70, 3.4301),
        ((33, 45, 80), 256, 0.75, 4.3487),
        ((33, 45, 80), 256, 0.80, 3.4120),
        ((11, 48, 85), 226, 0.75, 1.4174),
    ],
)
def test_width_in_frames(context, grid, text, sparsity, frames):
    assert SparseVDiT(sparsity=sparsity).width(context(grid, text)) / (grid[1] * grid[2]) == pytest.approx(
        frames, abs=1e-4
    )


def test_density_of_bands_is_the_request(context):
    ctx = context((20, 16, 16))
    for sparsity in (0.9, 0.75, 0.5, 0.25):
        for mode in ("diagonal", "multi_diagonal"):
            planner = SparseVDiT(modes=mode, sparsity=sparsity, block=64, sinks=0)
            assert planner.plan(*random(ctx)[:2], ctx).density == pytest.approx(1 - sparsity, abs=0.03)
    planner = SparseVDiT(sparsity=0.75, block=64)
    blocks = range(planner.stripe_count(ctx))
    planner = replace(planner, modes="v", stripes=((0, 0, blocks), (0, 1, blocks)))
    assert planner.plan(*random(ctx)[:2], ctx).density == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (9, True)])
def test_width_of_everything_and_all_columns_are_dense(context, text, text_first):
    ctx = context(GRID, text, text_first=text_first)
    q, k, v = random(ctx, 3)
    planner = SparseVDiT(modes="dmv", sparsity=0, block=16, stripes={"0.2": "0-10"})
    plan = planner.plan(q, k, ctx).validate()
    assert plan.density == 1
    dense = vdit_fast.reference.attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan).double(), dense, atol=2e-6, rtol=1e-5)


def test_skip_gives_zeros_and_full_is_bit_equal_to_dense(context):
    ctx = context(GRID, 9)
    q, k, v = random(ctx, 3, batch=2)
    out = vdit_fast.attention(q, k, v, SparseVDiT(modes="fsm", block=16).plan(q, k, ctx))
    assert torch.equal(out[:, :, 0], vdit_fast.attention(q, k, v)[:, :, 0])
    assert not out[:, :, 1].any() and out[:, :, 2].any()
    out = vdit_fast.attention(q, k, v, SparseVDiT(modes="skip").plan(q, k, ctx).validate())
    assert out.shape == q.shape and not out.any()
    assert "full" in SparseVDiT(modes="full").decide(ctx)
    assert SparseVDiT(modes="full").decision(q, k, v, ctx).plan is None


def test_one_launch_equals_each_head_alone(context):
    ctx = context(GRID, 9, kv_len=torch.tensor([219, 213]))
    q, k, v = random(ctx, 6, batch=2)
    k[1, 213:] = 40.0  # padding, never to be read
    planner = SparseVDiT(modes="mdvfsm", block=16, stripes={"0.2": "1,4-5"})
    mixed = vdit_fast.attention(q, k, v, planner.plan(q, k, ctx).validate(), kv_len=ctx.kv_len)
    want = vdit_fast.reference.attention(q, k, v, planner.plan(q, k, ctx), kv_len=ctx.kv_len)
    torch.testing.assert_close(mixed, want, atol=2e-6, rtol=1e-5)
    for h, letter in enumerate("mdvfsm"):
        x = [t[:, :, h : h + 1] for t in (q, k, v)]
        alone = SparseVDiT(modes=letter, block=16, stripes={"0.0": "1,4-5"}).plan(*x[:2], ctx)
        assert torch.equal(mixed[:, :, h : h + 1], vdit_fast.attention(*x, alone, kv_len=ctx.kv_len)), letter


def test_grouped_heads(context):
    ctx = context(GRID)
    q = random(ctx, 4)[0]
    k, v = random(ctx, 2)[:2]
    plan = SparseVDiT(modes="dmsf", block=16).plan(q, k, ctx).validate()
    want = vdit_fast.reference.attention(q, k, v, plan)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), want, atol=2e-6, rtol=1e-5)


def test_heads_of_one_kind_share_a_plan(context):
    ctx = context(GRID)
    q, k, _ = random(ctx, 4)
    for mode, order in (("d", None), ("dddd", None), ("m", (1, 1, 210)), ("mmmm", (1, 1, 210)), ("ff", None)):
        if len(mode) != 2:
            plan = SparseVDiT(modes=mode, block=16).plan(q, k, ctx)
            assert plan.shape[:2] == (1, 1) and (None if plan.q_order is None else tuple(plan.q_order.shape)) == order
    assert SparseVDiT(modes="mmsm", block=16).plan(q, k, ctx).q_order.shape[1] == 1
    plan = SparseVDiT(modes="fvfs", block=16).plan(q, k, ctx)
    assert plan.q_order is None and len(plan.tiles) == 4 and len(plan.runs) == 3  # no cut where rows read alike


def test_plan_is_kept_until_the_row_changes(context):
    static: dict = {}
    planner = SparseVDiT(modes=[{"step": 0, "layers": "ff"}, {"step": 2, "layers": ["dd", "dm", "md", "ss"]}], block=16)

    def plan(step, layer):
        ctx = context(GRID, layer=layer, static=static, step=StepContext(step=step, num_steps=10))
        assert (planner.decide(ctx) is None) == (step >= 2)
        return planner.plan(*random(ctx)[:2], ctx)

    assert plan(1, 1).density == 1
    a, b = plan(2, 1), plan(9, 1)
    assert a.runs is b.runs and torch.equal(a.to_mask(), b.to_mask())
    assert not torch.equal(plan(2, 2).to_mask(), a.to_mask()) and plan(2, 3).density == 0
    assert len([key for key in static if key[0] == "sparse_vdit plan"]) == 3


def test_a_plan_is_made_once_per_row_and_a_mode_once_per_geometry(context, monkeypatch):
    bands, joined = [], []
    band, join = Layout.band, sparse_vdit.join
    monkeypatch.setattr(Layout, "band", lambda *args, **kwargs: bands.append(kwargs) or band(*args, **kwargs))
    monkeypatch.setattr(sparse_vdit, "join", lambda *args: joined.append(args) or join(*args))
    planner = SparseVDiT(modes=[{"step": 0, "layers": ["dmdm", "dmdm", "mmdd", "dmvv"]}, {"step": 2, "layers": "dddd"}])
    planner, static = replace(planner, block=16), {}

    def plan(step, layer):
        ctx = context(GRID, layer=layer, static=static, step=StepContext(step=step, num_steps=10))
        return planner.plan(*random(ctx, 4)[:2], ctx)

    first = [plan(0, layer) for layer in range(4)]
    assert first[0].runs is first[1].runs and len(joined) == 3 and len(bands) == 2
    again = [plan(1, layer) for layer in range(4)]
    assert len(joined) == 3 and all(a.runs is b.runs for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a.q_order, b.q_order) for a, b in zip(first, again, strict=True))
    plan(2, 0), plan(2, 1)
    assert len(joined) == 4 and len(bands) == 2
    del first, again
    gc.collect()
    (shared,) = [x for key, x in static.items() if key[0] == "sparse_vdit shared plans"]
    assert len(shared) == 3  # the first row is no layer's any more


def test_joined_heads_are_one_compilation_of_their_maps():
    maps, q_len, kv_len = torch.rand(5, 7, 9) < 0.5, torch.randint(0, 9, (7,)), torch.randint(0, 9, (9,))
    maps[3], maps[4] = False, maps[0]
    n = max(int(q_len.sum()), int(kv_len.sum()))
    q_len[0] += n - q_len.sum()
    kv_len[0] += n - kv_len.sum()
    one = AttentionPlan.from_block_mask(maps, q_len, kv_len)
    heads = [HeadRuns.of(AttentionPlan.from_block_mask(each, q_len, kv_len)) for each in maps]
    assert plans_equal(join(heads, n), one)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    text=st.integers(0, 5),
    text_first=st.booleans(),
    sinks=st.integers(0, 6),
    sparsity=st.floats(0, 0.99),
    block=st.integers(1, 40),
    modes=st.text("fdmvs", min_size=3, max_size=3),
)
def test_any_shape_gives_a_valid_plan(grid, text, text_first, sinks, sparsity, block, modes):
    ctx = LayerContext(0, 1, "a", grid, math.prod(grid), text, text_first)
    stripes = {f"0.{h}": "0" for h in range(3)} if sinks < grid[0] else {}
    planner = SparseVDiT(modes=modes, sinks=sinks, sparsity=sparsity, block=block, stripes=stripes)
    mask = mask_of(planner, ctx, 3)
    for head, letter in enumerate(modes):
        if letter == "s":
            assert not mask[head].any()
            continue
        assert mask[head][ctx.text_slice].all() and mask[head][:, ctx.text_slice].all()
        assert mask[head][:, ctx.video_slice][:, : sinks * grid[1] * grid[2]].all() and mask[head].any(1).all()
        if letter in "df" or (letter == "m" and not sinks):
            assert mask[head].diagonal().all()
        elif letter == "m":  # places are scaled where sink frames are missing: of its own place a token reads some key
            place = torch.arange(ctx.n_video) % (grid[1] * grid[2])
            own = mask[head][ctx.video_slice, ctx.video_slice] & (place[:, None] == place)
            assert own.any(1).all()


# ---------------------------------------------------------------------- the table
@pytest.mark.parametrize(
    ("given_as", "form", "row"),
    [
        ("diagonal", "diagonal", "d"),
        ("m", "multi_diagonal", "m"),
        ("dm", "dm", "dm"),
        (["dm", "full", "sv", "m"], ["dm", "f", "sv", "m"], "sv"),
        ({"step": 0, "layers": "dm"}, "dm", "dm"),
        (
            [{"step": 0, "layers": "full"}, {"step": 3, "layers": ["dm", "f", "sv", "m"]}],
            [{"step": 0, "layers": "full"}, {"step": 3, "layers": ["dm", "f", "sv", "m"]}],
            "sv",
        ),
    ],
)
def test_forms_of_the_table_round_trip(context, tmp_path, given_as, form, row):
    planner = from_dict({"method": "sparse_vdit", "modes": given_as, "stripes": {"2.1": "7,0-2"}, "record": {"b": 1}})
    assert planner._row(context(GRID, layer=2, step=StepContext(step=3))) == row
    data = planner.to_dict()
    assert data["modes"] == form and data["stripes"] == {"2.1": "0-2,7"} and data["record"] == {"b": 1}
    assert from_dict(json.loads(json.dumps(data))) == planner and hash(planner) == hash(from_dict(data))
    for name in ("a.yaml", "a.json"):
        if name.endswith("yaml"):
            pytest.importorskip("yaml")
        Config(attention=planner).save(tmp_path / name)
        assert Config.of(tmp_path / name).attention == planner


def test_made_for_round_trips():
    planner = SparseVDiT(modes=["dm", "ff", "sv", "m"], made_for=MADE)
    assert planner.to_dict()["made_for"] == MADE and from_dict(planner.to_dict()) == planner


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"modes": "banded"}, "modes must be a mode's name"),
        ({"modes": ""}, "modes"),
        ({"modes": []}, "modes must be a mode's name"),
        ({"modes": 3}, "modes must be a mode's name"),
        ({"modes": ["dm", 3]}, "modes"),
        ({"modes": ["dm", "dmf"]}, r"equally many heads everywhere, got \[2, 3\]"),
        ({"modes": [{"step": 1, "layers": "d"}]}, "begin at step 0"),
        ({"modes": [{"step": 0, "layers": "d"}, {"step": 0, "layers": "f"}]}, "ascend"),
        ({"modes": [{"step": 0, "layers": ["d"] * 2}, {"step": 1, "layers": ["f"] * 3}]}, "equally many layers"),
        ({"modes": [{"step": 0}]}, r"modes\[0\] must have the keys"),
        ({"modes": [{"step": -1, "layers": "d"}]}, r"modes\[0\].step"),
        ({"sparsity": 1}, "sparsity"),
        ({"block": 0}, "block"),
        ({"stripes": "0-3"}, "stripes"),
        ({"stripes": {"3": "0"}}, "stripes"),
        ({"stripes": {"0.1": "a"}}, "stripes"),
        ({"stripes": {"0.1": "3-1"}}, r"stripes .* got \('0', '1', '3-1'\)"),
        ({"stripes": {"0.1": "0,5-4"}}, "stripes"),
        ({"stripes": {"4.1": "0"}, "made_for": MADE}, r"stripes name layer 4, but the table has 4 layers"),
        ({"stripes": {"3.2": "0"}, "made_for": MADE}, r"stripes name head 2, but the table has 2 heads"),
        ({"made_for": {"layers": 4}}, "made_for must be a mapping with exactly the keys family, layers"),
        ({"made_for": {**MADE, "steps": 0}}, "made_for.steps"),
        ({"made_for": {**MADE, "grid": [1, 2]}}, "made_for.grid"),
        ({"made_for": MADE, "modes": ["d"] * 3}, "made_for says 4 layers"),
        ({"made_for": MADE, "modes": "dmf"}, "2 heads"),
        ({"force": 1}, "force"),
        ({"record": [1]}, "record"),
        ({"record": "[1]"}, "record must be a mapping"),
        ({"record": "{bad"}, r"record must be .* got '{bad'"),
        ({"record": {"a": math.nan}}, "record must be .* nan"),
        ({"record": {"a": {1, 2}}}, "record must be .* {1, 2}"),
    ],
)
def test_bad_settings_say_what_is_wrong(knobs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        SparseVDiT(**knobs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"family": "hunyuan_video"}, r"family wan \(here hunyuan_video\)"),
        ({"grid": (5, 6, 8)}, r"token grid \(5, 6, 7\) \(here \(5, 6, 8\)\)"),
        ({"text": 3}, r"text tokens 0 \(here 3\)"),
        ({"step": StepContext(step=1, num_steps=20)}, r"steps 10 \(here 20\)"),
        ({"step": StepContext(step=1)}, r"steps 10 \(here an unknown number\)"),
        ({"num_layers": 6}, "4 layers, the model has 6"),
    ],
)
def test_another_setting_is_refused_unless_forced(context, change, match):
    planner = SparseVDiT(modes=["dm", "ff", "sd", "m"], made_for=MADE, block=16)
    grid, text = change.get("grid", GRID), change.get("text", 0)
    rest = {key: value for key, value in change.items() if key not in ("grid", "text")}
    good, bad = context(GRID, family="wan"), context(grid, text, **rest)
    assert planner.decide(good) is None and planner.plan(*random(good)[:2], good)
    q, k, v = random(bad)
    for call in (lambda: planner.decide(bad), lambda: planner.plan(q, k, bad), lambda: planner.decision(q, k, v, bad)):
        with pytest.raises(ValueError, match=match):
            call()
    forced = replace(planner, force=True)
    if "num_layers" in change:
        with pytest.raises(ValueError, match=match):
            forced.decide(bad)
    else:
        assert forced.decide(bad) is None and forced.plan(q, k, bad).validate()


def test_wrong_number_of_heads(context):
    ctx = context(GRID, family="wan")
    for planner in (SparseVDiT(modes="dm"), SparseVDiT(modes="d", made_for=MADE)):
        with pytest.raises(ValueError, match="has 2 heads, the model has 3"):
            planner.plan(*random(ctx, 3)[:2], ctx)
    with pytest.raises(ValueError, match="3 layers, the model has 4"):
        SparseVDiT(modes=["dm"] * 3).decide(ctx)


def test_stripes_of_layers_and_heads_that_are_not_there(context):
    ctx = context(GRID)
    q, k, v = random(ctx)
    planner = SparseVDiT(modes="v", stripes={"9.7": "0"})
    for call in (lambda: planner.decide(ctx), lambda: planner.plan(q, k, ctx), lambda: planner.decision(q, k, v, ctx)):
        with pytest.raises(ValueError, match=r"stripes name (layer 9|head 7), but the model has [42] "):
            call()
    with pytest.raises(ValueError, match="stripes name head 2, but the table has 2 heads"):
        SparseVDiT(modes="dv", stripes={"3.2": "0"}).decide(ctx)
    for dense in ({}, {"dense_layers": 4}):
        planner = SparseVDiT(modes="full" if not dense else "v", stripes={"3.2": "0"}, **dense)
        assert planner.decide(ctx) is not None  # the heads are not known here
        with pytest.raises(ValueError, match="stripes name head 2, but the model has 2 heads"):
            planner.plan(q, k, ctx)
        with pytest.raises(ValueError, match="stripes name head 2, but the model has 2 heads"):
            planner.decision(q, k, v, ctx)
    assert SparseVDiT(modes="v", stripes={"3.1": "0"}).plan(q, k, ctx).validate()


def test_forced_steps_map_to_the_nearest_relative_time(context):
    ranges = [{"step": i, "layers": "sdmvf"[i]} for i in range(5)]
    planner = SparseVDiT(modes=ranges, made_for={**MADE, "steps": 5}, force=True)

    def rows(total):
        return "".join(planner._row(context(GRID, step=StepContext(step=i, num_steps=total))) for i in range(total))

    assert rows(5) == "sdmvf" and rows(10) == "ssddmmvvff" and rows(3) == "smf" and rows(1) == "m"
    free = SparseVDiT(modes=ranges)
    assert free._row(context(GRID, step=StepContext(step=9, num_steps=50))) == "f"
    assert "unknown" in free.decide(context(GRID, step=StepContext()))


def test_forced_stripes_keep_their_relative_place(context):
    made = {**MADE, "grid": [5, 4, 8], "heads": 1}
    planner = SparseVDiT(modes="v", sinks=1, block=8, stripes={"0.0": "0-3"}, made_for=made, force=True)
    mask = mask_of(planner, context((5, 8, 16), family="wan"), 1)[0, 0]
    assert torch.equal(mask, torch.arange(640) < 128 + 128)  # the sink frame, and the first late frame of four


def test_stripes_outside_the_grid_and_empty_ones(context):
    ctx = context(GRID)
    q, k, _ = random(ctx)
    with pytest.raises(ValueError, match="name block 11, but there are 11 blocks"):
        SparseVDiT(modes="fv", block=16, stripes={"0.1": "3,11"}).plan(q, k, ctx)
    with pytest.raises(ValueError, match="head 0 of layer 0 is vertical but reads nothing"):
        SparseVDiT(modes="vertical", sinks=0).plan(q, k, ctx)


@pytest.mark.parametrize("mode", ["diagonal", "multi_diagonal"])
def test_error_falls_as_density_grows(context, smooth, mode):
    grid, errors = (6, 12, 12), torch.zeros(4)
    for seed in range(3):
        q, k, v = smooth(grid, 2, 16, 2.0, seed)
        dense = vdit_fast.attention(q, k, v)
        for i, sparsity in enumerate((0.9, 0.7, 0.4, 0.0)):
            plan = SparseVDiT(modes=mode, sparsity=sparsity, block=18).plan(q, k, context(grid))
            errors[i] += float((vdit_fast.attention(q, k, v, plan) - dense).norm() / dense.norm())
    assert (errors.diff() < 0).all() and errors[-1] < 1e-5, errors
