"""The search on heads whose best pattern is known, and on tiny real models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import SparseVDiT
from vdit_fast.planners._mode_runs import Layout
from vdit_fast.tune import tune
from vdit_fast.tune.search import Columns, Search

GRID = (8, 6, 8)
COSTS = {"skip": 0.02, "diagonal": 0.28, "multi_diagonal": 0.3, "vertical": 0.26}
MODES = tuple(COSTS)


def context(grid=GRID, layer=0, text=0, **where):
    step = StepContext(**{"step": 0, "num_steps": 4, **where})
    return LayerContext(layer, 2, "a", grid, math.prod(grid), text, step=step, family="wan")


def search(price=0.01, max_loss=0.5, **knobs):
    base = knobs.pop("base", SparseVDiT(sparsity=0.7, block=16, sinks=0))
    found = Search(base=base, modes=MODES, price=price, max_loss=max_loss, **knobs)
    found.costs.update(COSTS)
    return found


def synthetic():
    """q, k, v of five heads: banded, banded in token-major order, one with V = 0, one of columns, one diffuse."""
    torch.manual_seed(0)
    frames, fs = GRID[0], GRID[1] * GRID[2]
    n = frames * fs
    frame, place = torch.arange(frames).repeat_interleave(fs), torch.arange(fs).repeat(frames)
    code = [torch.nn.functional.one_hot(x, 64).float() * 12 for x in (frame, place)]
    q, k, v = torch.randn(3, 1, n, 5, 64).unbind()
    for head in range(2):
        q[0, :, head] = k[0, :, head] = code[head]
    v[:, :, 2] = 0
    q[0, :, 3], k[0, :, 3] = 3.0, 0.0
    k[0, 5 * 16 : 7 * 16, 3] = 1.0  # two blocks that everyone reads
    q[:, :, 4] *= 0.01
    return q, k, v


def test_heads_with_a_known_pattern_choose_it():
    q, k, v = synthetic()
    columns = Columns(base=SparseVDiT(sparsity=0.7, block=16, sinks=0))
    assert columns.decision(q, k, v, context()).plan is None
    stripes = columns.stripes()
    assert {5, 6} <= set(stripes["0.3"]) and len(stripes["0.3"]) == round(0.3 * 24)
    found = search(base=replace(columns.base, stripes=stripes))
    decision = found.decision(q, k, v, context())
    assert found.row((0, 0)) == "dmsvf"
    out = vdit_fast.attention(q, k, v, decision.plan)  # the forward goes on with the chosen outputs
    dense = vdit_fast.attention(q, k, v)
    torch.testing.assert_close(out[:, :, :2], dense[:, :, :2], atol=1e-3, rtol=1e-3)
    assert not out[:, :, 2].any() and torch.equal(out[:, :, 4], dense[:, :, 4])
    planner = found.found(stripes, {"machine": "x"})
    assert set(planner.to_dict()["stripes"]) == {"0.3"} and planner.made_for.steps == 4
    assert planner.to_dict()["modes"] == [
        {"step": 0, "layers": ["dmsvf", "fffff"]},
        {"step": 1, "layers": ["fffff", "fffff"]},
    ]
    assert torch.equal(planner.plan(q, k, context()).to_mask(), decision.plan.to_mask())


def test_column_sums_are_those_of_the_attention_matrix():
    torch.manual_seed(0)
    ctx = context((5, 6, 7), text=9)
    ctx.kv_len = torch.tensor([219, 213])
    q, k, v = torch.randn(3, 2, 219, 4, 8).unbind()
    k = k[:, :, :2]
    k[1, 213:] = 9.0
    columns = Columns(base=SparseVDiT(sparsity=0.7, block=16, sinks=1))
    columns.decision(q, k, v, ctx)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    scores[1, :, :, 213:] = -math.inf
    weights = torch.softmax(scores, -1)[:, :, :210, 42:210].sum(2)
    want = torch.nn.functional.pad(weights, (0, 8)).unflatten(2, (11, 16)).sum(-1).mean(0)
    torch.testing.assert_close(columns.sums[0].float(), want, rtol=1e-4, atol=1e-4)
    assert Layout(ctx, 16, 1).stripes == 11


def test_padding_rows_have_no_say_in_the_column_sums():
    ctx = context((5, 6, 7))
    ctx.kv_len = torch.tensor([210, 150])
    q, k, v = torch.randn(3, 2, 210, 2, 8).unbind()
    sums = {}
    for value in (0.0, 9.0, math.nan):
        q[1, 150:], k[1, 150:] = value, 1.0
        columns = Columns(base=SparseVDiT(sparsity=0.7, block=16, sinks=1))
        columns.decision(q, k, v, ctx)
        sums[value] = columns.sums[0]
    weights = torch.stack([
        torch.nn.functional.pad((torch.einsum("qhd,khd->hqk", q[b, :n], k[b, :n]) / math.sqrt(8)).softmax(-1).sum(1)[
            :, 42:], (0, 218 - n)).unflatten(1, (11, 16)).sum(-1) for b, n in enumerate((210, 150))])  # fmt: skip
    for found in sums.values():
        torch.testing.assert_close(found.float(), weights.mean(0), rtol=1e-4, atol=1e-4)


def test_a_search_keeps_the_plans_of_its_modes_and_of_the_latest_rows():
    """Its memory does not grow with the number of rows it has tried."""
    found = search(
        base=SparseVDiT(sparsity=0.7, block=16, sinks=0, stripes={f"{x // 5}.{x % 5}": "5" for x in range(10)})
    )
    q, k, v = synthetic()
    rows = set()
    for turn in range(5):
        heads = torch.arange(5).roll(turn)
        for layer in range(2):
            ctx = context(layer=layer, step=turn % 4)
            found.decision(*(x[:, :, heads] for x in (q, k, v)), ctx)
            rows.add((layer, found.row((turn % 4, layer))))
    assert len(rows) > 6 and set(found.row_plans) == {0, 1}
    assert set(found.mode_plans) == {("sssss", None), ("ddddd", None), ("mmmmm", None), ("vvvvv", 0), ("vvvvv", 1)}


@pytest.mark.parametrize(
    ("price", "max_loss", "row"), [(0.0, -1.0, "fffff"), (1e9, math.inf, "sssss"), (0.0, math.inf, None)]
)
def test_extreme_settings(price, max_loss, row):
    q, k, v = synthetic()
    found = search(price, max_loss, base=SparseVDiT(sparsity=0.7, block=16, sinks=0, stripes={
        f"0.{h}": "5-11" for h in range(5)}))  # fmt: skip
    decision = found.decision(q, k, v, context())
    best = "".join("sdmv"[i] for i in found.errors[0, 0].argmin(-1).tolist())
    assert found.row((0, 0)) == (row or best)
    assert (decision.plan is None) == (row == "fffff")
    if row == "sssss":
        assert not vdit_fast.attention(q, k, v, decision.plan).any()


def test_errors_are_averaged_before_the_choice():
    q, k, v = synthetic()
    swapped = [x[:, :, [1, 0, 2, 3, 4]] for x in (q, k, v)]
    stripes = {f"0.{h}": "5-11" for h in range(5)}
    base = SparseVDiT(sparsity=0.7, block=16, sinks=0, stripes=stripes)
    mean = {}
    for calls in ([(q, k, v)], [swapped], [(q, k, v), swapped]):
        found = search(groups=2, base=base)
        for i, call in enumerate(calls):
            found.decision(*call, context(step=i % 2))  # one step range of two steps
        assert found.calls[0, 0] == len(calls)
        mean[len(mean)] = found.errors[0, 0] / len(calls)
    torch.testing.assert_close(mean[2], (mean[0] + mean[1]) / 2)
    assert found.row((0, 0))[0] not in "dm"  # neither pattern serves both


def test_common_knobs_hold_and_settings_may_not_change():
    q, k, v = synthetic()
    base = SparseVDiT(sparsity=0.7, block=16, sinks=0, dense_steps=1, dense_layers=(1,), stripes={
        f"0.{h}": "0" for h in range(5)})  # fmt: skip
    found = search(base=base)
    assert "dense_steps" in found.decision(q, k, v, context()).reason
    assert "dense_layers" in found.decision(q, k, v, context(step=1, layer=1)).reason
    found.decision(q, k, v, context(step=1))
    assert set(found.errors) == {(1, 0)} and found.table()[0]["layers"] == ["fffff"] * 2
    with pytest.raises(ValueError, match="runs differ"):
        found.decision(q, k, v, context(step=1, num_steps=5))
    with pytest.raises(ValueError, match="number of denoising steps is unknown"):
        found.decision(q, k, v, context(num_steps=None))


# ---------------------------------------------------------------------- on models
class Pipe:
    """A transformer, a scheduler and a loop over its steps."""

    def __init__(self, model, inputs, steps=3):
        diffusers = pytest.importorskip("diffusers")
        self.transformer, self.inputs, self.steps = model, inputs, steps
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self):
        self.scheduler.set_timesteps(self.steps)
        inputs = dict(self.inputs)
        for t in self.scheduler.timesteps:
            out = self.transformer(**{**inputs, "timestep": t.expand(len(inputs["hidden_states"]))})[0]
            inputs["hidden_states"] = inputs["hidden_states"] - 0.1 * out
        return inputs["hidden_states"]


def wan(heads=2):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 5, 12, 12), "encoder_hidden_states": torch.randn(1, 8, 16)}
    return model.eval().requires_grad_(False), {**inputs, "return_dict": False}


def hunyuan():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model.eval().requires_grad_(False), {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(2, 9, 16),
        "pooled_projections": torch.randn(2, 8),
        "encoder_attention_mask": (torch.arange(9) < torch.tensor([[5], [9]])).long(),
        "guidance": torch.full((2,), 6000.0),
        "return_dict": False,
    }


BASE = SparseVDiT(sparsity=0.6, block=16)


@pytest.mark.parametrize(("build", "family", "text"), [(wan, "wan", 0), (hunyuan, "hunyuan_video", 9)])
def test_a_tuned_file_applies_to_its_model_and_to_no_other(build, family, text, tmp_path):
    pytest.importorskip("yaml")
    pipe = Pipe(*build())
    stock = pipe()
    tuned = tune(pipe, [pipe, pipe], base=BASE, price=0.05, max_loss=2.0, cost="pairs")
    made = tuned.planner.made_for
    assert (made.family, made.layers, made.heads, made.text, made.steps) == (family, 2, 2, text, 3)
    assert torch.equal(pipe(), stock)  # the model is as it was
    assert sum(tuned.shares().values()) == pytest.approx(1) and tuned.shares()["full"] < 1
    record = tuned.planner.to_dict()["record"]
    assert record["cost"]["of"] == "pairs" and record["runs"] == 2 and record["machine"] and record["price"] == 0.05
    Config(attention=tuned.planner).save(tmp_path / "tuned.yaml")
    with accelerate(pipe, tmp_path / "tuned.yaml") as handle:
        pipe()
        density = sum(layer["mean_density"] for layer in handle.stats()["layers"]) / 2
        assert density == pytest.approx(tuned.density, abs=0.02)
        pipe.steps = 5
        with pytest.raises(ValueError, match=r"made for steps 3 \(here 5\).*vdit-fast tune.*force"):
            pipe()
    with accelerate(pipe, Config(attention=replace(tuned.planner, force=True))):
        assert pipe().isfinite().all()
    with (
        accelerate(pipe.transformer, Config(attention=tuned.planner)),
        pytest.raises(ValueError, match="unknown number"),
    ):
        pipe()


def test_a_negative_limit_gives_the_dense_run_bit_by_bit():
    pipe = Pipe(*wan())
    tuned = tune(pipe, [pipe], base=BASE, max_loss=-1.0, rounds=1)
    assert tuned.planner.to_dict()["modes"] == ["ff", "ff"] and tuned.density == tuned.cost == 1
    with accelerate(pipe, "exact"):
        dense = pipe()
    with accelerate(pipe, Config(attention=tuned.planner)):
        assert torch.equal(pipe(), dense)
    everything = tune(pipe, [pipe], base=BASE, price=1e6, max_loss=math.inf, cost="pairs")
    assert everything.planner.to_dict()["modes"] == ["ss", "ss"] and everything.density == 0


def test_later_layers_are_judged_on_the_perturbed_forward():
    pipe = Pipe(*wan())
    exact = tune(pipe, [pipe], base=BASE, max_loss=-1.0, cost="pairs")
    skipped = tune(pipe, [pipe], base=BASE, price=1e6, max_loss=math.inf, cost="pairs")
    assert exact.errors[0][0] == skipped.errors[0][0]  # the first layer of the first step has seen nothing yet
    assert exact.errors[0][1] != skipped.errors[0][1] and exact.errors[1][0] != skipped.errors[1][0]


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"modes": ("full",)}, "modes must be different ones of skip, diagonal"),
        ({"modes": ()}, "modes"),
        ({"price": -1}, "price"),
        ({"price": math.inf}, "price"),
        ({"max_loss": math.nan}, "max_loss"),
        ({"cost": "money"}, '"time" or "pairs"'),
        ({"groups": 0}, "groups"),
        ({"rounds": 0}, "rounds"),
        ({"base": replace(BASE, min_tokens=10**6)}, "no attention call is left to search.*min_tokens"),
    ],
)
def test_bad_settings_say_what_is_wrong(knobs, match):
    pipe = Pipe(*wan())
    with pytest.raises(ValueError, match=match):
        tune(pipe, [pipe], **{"base": BASE, **knobs})
    with pytest.raises(ValueError, match="runs is empty"):
        tune(pipe, [])
    with pytest.raises(ValueError, match="draw with the target itself"):
        tune(pipe, [lambda: None])
