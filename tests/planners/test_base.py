"""The planner base: dense-or-sparse decisions, checks of settings, dict form."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
import torch

from vdit_fast.context import StepContext
from vdit_fast.planners import REGISTRY, Draft, Planner, Window, from_dict

GRID = (2, 16, 16)


@pytest.mark.parametrize(
    ("knob", "step", "dense"),
    [
        (3, {"step": 2, "num_steps": 10}, True),
        (3, {"step": 3, "num_steps": 10}, False),
        (3, {"step": 2}, True),  # a count needs no total
        (3, {"step": 3}, False),
        (0.3, {"step": 2, "num_steps": 10}, True),
        (0.3, {"step": 3, "num_steps": 10}, False),
        (0.29, {"step": 28, "num_steps": 100}, True),  # 0.29 * 100 < 29 in binary
        (0.29, {"step": 29, "num_steps": 100}, False),
        (0.25, {"step": 0, "num_steps": 3}, False),  # floor
        (0.3, {"step": 4, "sigma": 0.71}, True),  # total unknown: the noise level decides
        (0.3, {"step": 1, "sigma": 0.69}, False),
        (0.3, {"sigma": 0.71}, True),
        (0.3, {"sigma": 0.69}, False),
        (0.2, {"sigma": 0.8}, False),  # 1 - 0.8 < 0.2 in binary
        (0.2, {"sigma": float(torch.tensor(0.8))}, False),  # and more so from fp32
        (0.2, {"sigma": 0.80001}, True),
        (3, {"sigma": 0.71, "num_steps": 10}, True),
        (3, {"sigma": 0.69, "num_steps": 10}, False),
        (3, {"sigma": 0.1}, True),  # neither step nor total
        (0.3, {"step": 4}, True),
        (0.3, {}, True),
        (3, {}, True),
        (0, {}, False),  # nothing to know when no step is dense
        (0.0, {}, False),
    ],
)
def test_dense_steps(context, knob, step, dense):
    reason = Draft(dense_steps=knob).decide(context(GRID, step=StepContext(**step)))
    assert (reason is not None) == dense
    if dense:
        assert "dense_steps" in reason


def test_reasons_read_well(context):
    step = StepContext(step=1, num_steps=10)
    assert Draft(dense_steps=3).decide(context(GRID, step=step)) == "step 1 < dense_steps 3"
    assert Draft(dense_steps=0.3).decide(context(GRID, step=step)) == "step 1 < dense_steps 3 (0.3 of 10)"
    assert Draft(dense_layers=1).decide(context(GRID)) == "layer 0 < dense_layers 1"
    assert Window(min_tokens=6000).decide(context((4, 25, 40))) == "4,000 tokens < min_tokens 6,000"
    assert "unknown" in Draft(dense_steps=3).decide(context(GRID, step=StepContext()))


@pytest.mark.parametrize(
    ("knob", "dense"),
    [(0, []), (1, [0]), (3, [0, 1, 2]), (9, [0, 1, 2, 3]), ((), []), ((0, -1), [0, 3]), ((2,), [2]), ((7, -9), [])],
)
def test_dense_layers(context, knob, dense):
    planner = Window(dense_layers=knob)
    assert [i for i in range(4) if planner.decide(context(GRID, layer=i))] == dense


def test_min_tokens_counts_text(context):
    assert Draft(min_tokens=520).decide(context(GRID)) is not None
    assert Draft(min_tokens=520).decide(context(GRID, 8)) is None


BAD = [
    (Draft, {"sparsity": 1.5}, "sparsity"),
    (Draft, {"sparsity": 1}, "sparsity"),
    (Draft, {"sparsity": -0.1}, "sparsity"),
    (Draft, {"sparsity": float("nan")}, "sparsity"),
    (Draft, {"sparsity": "0.5"}, "sparsity"),
    (Draft, {"sparsity": True}, "sparsity"),
    (Draft, {"pool": (0, 4)}, r"pool\[0\]"),
    (Draft, {"pool": 8}, "pool"),
    (Draft, {"pool": (8, 16, 2)}, "pool"),
    (Draft, {"pool": (8, 1.5)}, r"pool\[1\]"),
    (Draft, {"pool_t": 0}, "pool_t"),
    (Draft, {"dense_steps": 1.0}, "dense_steps"),
    (Draft, {"dense_steps": float("inf")}, "dense_steps"),
    (Draft, {"dense_steps": -1}, "dense_steps"),
    (Draft, {"dense_steps": True}, "dense_steps"),
    (Draft, {"dense_steps": "3"}, "dense_steps"),
    (Draft, {"dense_layers": -1}, "dense_layers"),
    (Draft, {"dense_layers": (0, 0.5)}, "dense_layers"),
    (Draft, {"min_tokens": -5}, "min_tokens"),
    (Draft, {"sinks": 0.5}, "sinks"),
    (Draft, {"text": "sparse"}, "text"),
    (Window, {"sparsity": float("nan")}, "sparsity"),
    (Window, {"tile": (0, 8, 8)}, r"tile\[0\]"),
    (Window, {"tile": "888"}, "tile"),
    (Window, {"window_spatial": (1, 2)}, "window_spatial"),
    (Window, {"window_temporal": (1, 2, -3)}, r"window_temporal\[2\]"),
    (Window, {"heads": "space"}, "heads"),
    (Window, {"heads": ("spatial", "auto")}, r"heads\[1\]"),
    (Window, {"heads": ()}, "heads"),
    (Window, {"heads": 3}, "heads"),
    (Window, {"rows": 0}, "rows"),
    (Window, {"refresh": -1}, "refresh"),
]


@pytest.mark.parametrize(("cls", "knobs", "name"), BAD)
def test_bad_settings_name_the_knob(cls, knobs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        cls(**knobs)


def test_inputs_must_fit_the_context(context):
    q = torch.randn(1, 512, 2, 8)
    for planner in (Draft(), Window()):
        for ctx in (context((2, 16, 15)), context(GRID, 1)):
            with pytest.raises(ValueError, match="512 tokens"):
                planner.plan(q, q, ctx)
        with pytest.raises(ValueError, match="n_video"):
            planner.plan(q, q, context(GRID, n_video=500))
        with pytest.raises(ValueError, match=r"k must be \[B, N, H, D\]"):
            planner.plan(q, q[0], context(GRID))
        for k in (torch.randn(1, 512, 3, 8), torch.randn(2, 512, 2, 8), torch.randn(1, 512, 2, 4)):
            with pytest.raises(ValueError, match="must share"):
                planner.plan(q, k, context(GRID))


@pytest.mark.parametrize(
    "planner",
    [
        Draft(),
        Draft(sparsity=0.9, pool=(4, 8), pool_t=2, dense_steps=0.25, dense_layers=(0, -1), min_tokens=10, sinks=1),
        Window(),
        Window(heads=("spatial", "temporal"), window_spatial=(5, 0, 0), tile=(1, 4, 4), refresh=5, dense_steps=2),
    ],
)
def test_dict_form_survives_json(planner):
    again = from_dict(json.loads(json.dumps(planner.to_dict())))
    assert again == planner and hash(again) == hash(planner)
    assert type(again.dense_steps) is type(planner.dense_steps)


def test_from_dict_names_the_nearest():
    with pytest.raises(ValueError, match="'draft'"):
        from_dict({"method": "drafft"})
    with pytest.raises(ValueError, match="did you mean 'sparsity'"):
        from_dict({"method": "draft", "sparsty": 0.5})
    with pytest.raises(ValueError, match="method"):
        from_dict({"sparsity": 0.5})
    with pytest.raises(ValueError, match="known: "):
        from_dict({"method": 3})
    with pytest.raises(TypeError, match="mapping"):
        from_dict(["draft"])


def test_planners_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        Draft().sparsity = 0.5
    with pytest.raises(TypeError):
        Draft(0.5)


def test_registry():
    assert REGISTRY["draft"] is Draft and REGISTRY["window"] is Window
    with pytest.raises(ValueError, match="already taken"):
        type("Other", (Draft,), {"name": "draft"})

    with pytest.raises(TypeError, match="Nothing must override plan"):
        type("Nothing", (Planner,), {"name": "nothing"})
    assert "nothing" not in REGISTRY

    class Unnamed(Planner):
        def plan(self, q, k, ctx):
            raise NotImplementedError

    assert Unnamed not in REGISTRY.values()


@pytest.mark.parametrize(
    "knobs",
    [
        {"method": "draft", "pool": [4, 4]},
        {"method": "sparge", "block": [32, 16]},
        {"method": "vsa"},
        {"method": "svg1", "sparsity": 0.7, "block": 16},
        {"method": "svg2", "sparsity": 0.7},
        {"method": "window", "heads": "auto", "tile": [1, 4, 4]},
    ],
    ids=lambda knobs: knobs["method"],
)
def test_scores_are_fp32_under_autocast(knobs, context):
    """A planner called by hand under autocast decides as without it."""
    q, k, v = torch.randn(3, 1, 512, 2, 16).unbind(0)
    planner = from_dict({**knobs, "dense_steps": 0})
    want = planner.decision(q, k, v, context(GRID)).plan
    with torch.autocast("cpu", torch.bfloat16):
        got = planner.decision(q, k, v, context(GRID)).plan
        by_plan = got if planner.name == "svg1" else planner.plan(q, k, context(GRID))  # svg1 needs the values
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(got.to_mask(), want.to_mask()) and torch.equal(by_plan.to_mask(), want.to_mask())
