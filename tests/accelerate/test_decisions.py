"""What a session makes of a planner's decision: every part of it acts, and nothing is kept longer than needed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import tiny
import torch
from planner_settings import PLANNERS, TIMES, build, config, plugged
from torch import Tensor, nn

from vdit_fast import reference
from vdit_fast.context import LayerContext
from vdit_fast.models.session import STATIC_ENTRIES
from vdit_fast.planners import REGISTRY, VSA, Decision, Planner

GRID = (4, 8, 8)
REMEMBERING = ("adaspa", "rettention", "svg1", "svg2", "window")  # what q, k and v of earlier calls said


def forget_time(model: nn.Module) -> None:
    """Make the model's output the same at every timestep."""
    from diffusers.models.embeddings import TimestepEmbedding

    found = [module for module in model.modules() if isinstance(module, TimestepEmbedding)]
    assert found
    for module in found:
        module.linear_1.weight.zero_()


@pytest.mark.parametrize("kind", ["wan", "hunyuan_video", "cogvideox"])
def test_rettention_of_standing_inputs_is_dense_attention(kind: str) -> None:
    """row_scale makes the window's softmax that of all keys, residual adds the other keys: both must arrive."""
    model, inputs = build(kind, (16, 8, 8))
    forget_time(model)
    stock = tiny.run(model, tiny.at(inputs, TIMES[-1]))
    handle = plugged(model, config("rettention", window=0.05, interval=4, increment=0.0))
    for t in TIMES:
        assert tiny.relative(tiny.run(model, tiny.at(inputs, t)), stock) < 1e-5, t
    for layer in handle.stats()["layers"]:
        assert layer["sparse_calls"] == 2 and layer["density"][-1] < 0.3, layer


@pytest.mark.parametrize("kind", ["wan", "wan_ti2v"])
def test_vsa_adds_its_gated_coarse_branch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, Tensor, Tensor, LayerContext]] = []
    outputs: list[Tensor] = []
    decide = VSA.decision

    def noted(self: VSA, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        asked.append((q, k, v, ctx))
        return decide(self, q, k, v, ctx)

    model, inputs = build(kind, GRID)
    settings = config("vsa", gate=1.0, dense_steps=0)
    plugged(model, settings)
    monkeypatch.setattr(VSA, "decision", noted)
    for block in model.blocks:
        block.attn1.to_out[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    tiny.run(model, inputs)
    assert len(asked) == len(outputs) == 2
    planner = settings.attention
    assert isinstance(planner, VSA)
    for (q, k, v, ctx), out in zip(asked, outputs, strict=True):
        fine = reference.attention(q, k, v, planner.plan(q, k, ctx))
        coarse = planner.coarse(planner.scores(q, k, ctx), v, ctx)
        assert tiny.relative(out, (fine + coarse).flatten(2)) < 1e-5
        assert tiny.relative(fine, (fine + coarse)) > 0.1  # it is not lost in the tolerance


@pytest.mark.parametrize("planner", ["adaspa", "rettention", "svg2"])
def test_queries_are_freed_between_forward_and_backward(planner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient checkpointing is there to free them; a kept `observe` would hold those of every layer."""
    alive: list[weakref.ref[Tensor]] = []
    cls = REGISTRY[planner]
    decide = cls.decision

    def noted(self: Planner, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        alive.extend(map(weakref.ref, (q, k, v)))
        return decide(self, q, k, v, ctx)

    monkeypatch.setattr(cls, "decision", noted)
    model, inputs = build("wan", GRID)
    model.requires_grad_(True).train()
    model.enable_gradient_checkpointing()
    handle = plugged(model, config(planner, dense_steps=0, **({"search": [0, 3]} if planner == "adaspa" else {})))
    loss = model(**tiny.at(inputs, TIMES[0]))[0].square().mean()
    gc.collect()
    assert len(alive) == 6 and not any(ref() is not None for ref in alive)
    loss.backward()
    assert handle.stats()["layers"][0]["calls"] == 1


@pytest.mark.parametrize("planner", PLANNERS)
def test_checkpointing_repeats_every_decision(planner: str) -> None:
    """Three pending forwards: dense (and observed), and sparse ones that differ where the planner remembers."""
    model, inputs = build("hunyuan_video")
    model.requires_grad_(True).train()
    runs = [tiny.at(inputs, t) for t in TIMES[:3]]
    handle = plugged(model, config(planner, **({"gate": 1.0} if planner == "vsa" else {})))
    plain = tiny.gradients(model, runs)
    handle.reset()
    model.enable_gradient_checkpointing()
    tiny.same_gradients(tiny.gradients(model, runs), plain)
    layers = handle.stats()["layers"]
    assert all(layer["calls"] == 6 and layer["sparse_calls"] >= 2 for layer in layers), "recomputation does not count"


def geometry_runs(model: nn.Module, inputs: dict[str, Any], times: tuple[float, ...] = TIMES) -> None:
    for t in times:
        tiny.run(model, tiny.at(inputs, t))


@pytest.mark.parametrize("planner", [name for name in PLANNERS if name != "svg2"])  # which has no tiling
def test_what_follows_from_the_geometry_is_made_once(planner: str) -> None:
    model, inputs = build("hunyuan_video")
    handle = plugged(model, config(planner))
    session = handle.roots[0].session
    geometry_runs(model, inputs)
    first = dict(session.static)
    assert first
    if planner not in REMEMBERING:
        assert not session.state, "a new generation would make this again"
    geometry_runs(model, inputs)
    assert handle.stats()["generations"] == 2
    assert session.static.keys() == first.keys() and all(session.static[key] is first[key] for key in first)
    handle.reconfigure(config(planner, dense_steps=2))
    assert not session.static


def test_geometry_is_kept_within_bounds_and_made_anew_after() -> None:
    model, inputs = build("wan")
    handle = plugged(model, config("vsa"))
    session = handle.roots[0].session
    geometry_runs(model, inputs)
    session.static.update((("other grid", i), i) for i in range(STATIC_ENTRIES))
    geometry_runs(model, inputs)
    assert len(session.static) == 1
    assert all(layer["sparse_calls"] == 6 for layer in handle.stats()["layers"])


def test_static_plans_serve_inference_and_training_alike() -> None:
    """What was made in inference mode may be saved for a backward in the next generation."""
    for planner in PLANNERS:
        model, inputs = build("wan")
        plugged(model, config(planner, dense_steps=0))
        with torch.inference_mode():
            geometry_runs(model, inputs)
        model.requires_grad_(True)
        for t in TIMES[:3]:
            model(**tiny.at(inputs, t))[0].square().mean().backward()
