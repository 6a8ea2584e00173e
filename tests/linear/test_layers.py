"""Linear layers of a model beside everything else: families, planners, caches, compilation, gradients, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from linear_models import by_matrix, watched
from planner_settings import PLANNERS, TIMES, build, config, plugged
from tiny import Band

from vdit_fast import accelerate
from vdit_fast.config import Config
from vdit_fast.linear import load_feature_maps


def split(stats: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The layers of a report: linear ones, the others."""
    linear = {(expert, layer) for expert, layers in stats["linear"].items() for layer in layers}
    rows = stats["layers"]
    return [r for r in rows if (r["expert"], r["layer"]) in linear], [
        r for r in rows if (r["expert"], r["layer"]) not in linear
    ]


@pytest.mark.parametrize("family", sorted(set(tiny.BUILDERS) - tiny.LINEAR))
def test_every_family_by_the_matrix(family: str, maps_for: Callable[..., Any]) -> None:
    """Joint text, padded keys, fewer heads of keys, scales of the model's own: all of it reaches the linear layers."""
    model, inputs = tiny.build(family)
    stock = tiny.run(model, inputs)
    linear = maps_for(model, inputs=inputs)
    maps = load_feature_maps(linear.weights)
    with accelerate(model), watched(by_matrix(maps)):
        want = tiny.run(model, inputs)
    handle = accelerate(model, Config(linear=linear))
    got = tiny.run(model, inputs)
    assert tiny.relative(got, want) < 2e-5 < tiny.relative(want, stock)
    stats = handle.stats()
    assert stats["linear"] == {"transformer": sorted(maps)}
    assert all(row["calls"] and not row["fallbacks"] and row["mean_density"] is None for row in split(stats)[0])
    assert f"linear attention: {len(maps)} of {len(stats['layers'])} layers" in handle.report()
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("kind", ["wan", "hunyuan_video"])
def test_planners_run_the_other_layers(planner: str, kind: str, maps_for: Callable[..., Any]) -> None:
    model, inputs = {"wan": lambda: tiny.wan(layers=3), "hunyuan_video": lambda: tiny.hunyuan(lengths=(5, 9))}[kind]()
    inputs = tiny.regrid(inputs, (5, 7, 9))
    linear = maps_for(model, [1], inputs=inputs)
    settings = config(planner)
    if planner == "shifted_window":  # it shifts every other layer of those that it sees, which are fewer now
        settings = replace(settings, attention=replace(settings.attention, shift=False))  # type: ignore[type-var]
    with plugged(model, settings), watched(by_matrix(load_feature_maps(linear.weights, layers=[1]))):
        want = [tiny.run(model, tiny.at(inputs, t)) for t in TIMES]
    handle = plugged(model, Config(attention=settings.attention, linear=linear, on_unsupported="error"))
    for t, expected in zip(TIMES, want, strict=True):
        assert tiny.relative(tiny.run(model, tiny.at(inputs, t)), expected) < 2e-5, t
    converted, others = split(handle.stats())
    assert [(row["layer"], row["calls"], row["sparse_calls"]) for row in converted] == [(1, len(TIMES), 0)]
    assert all(row["sparse_calls"] > 0 and not row["fallbacks"] for row in others)
    assert not converted[0]["dense"] and converted[0]["plan_seconds"] == 0


def test_planners_do_not_see_linear_layers(maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=4)
    linear = maps_for(model, [0, 2], inputs=inputs)
    handle = accelerate(model, Config(attention=Band(), linear=linear))
    tiny.run(model, inputs)
    session = handle.roots[0].session
    assert [seen[0] for seen in session.state["seen"]] == [0, 1] and session.planned == 2
    assert [ledger.place for ledger in session.layers if ledger.planned] == [0, 1]
    handle.reconfigure(Config(attention=Band()))  # all four again
    tiny.run(model, inputs)
    assert [seen[0] for seen in session.state["seen"]] == [0, 1, 2, 3] and session.planned == 4
    assert handle.stats()["linear"] is None


def test_reconfigure_there_and_back(maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=3)
    linear = maps_for(model, [1, 2], inputs=inputs)
    handle = accelerate(model)
    exact = tiny.run(model, inputs)
    handle.reconfigure(Config(linear=linear))
    mixed = tiny.run(model, inputs)
    assert tiny.relative(mixed, exact) > 1e-3
    assert accelerate(model, Config(linear=linear)) is handle
    with pytest.raises(RuntimeError, match=r"already accelerated.*linear is .*, not None"):
        accelerate(model)
    handle.reconfigure("exact")
    assert torch.equal(tiny.run(model, inputs), exact)


def test_with_a_cache(maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=3)
    linear = maps_for(model, [1], inputs=inputs)
    cache = {"method": "taylorseer", "first_full": 1, "interval": 2, "last_full": 0}
    handle = plugged(model, Config.from_dict({"cache": cache, "linear": linear.to_dict()}))
    for t in TIMES:
        tiny.run(model, tiny.at(inputs, t))
    stats = handle.stats()
    computed = sum(stats["cache"]["full"].values())
    assert computed < len(TIMES) == computed + sum(stats["cache"]["forecast"].values())
    assert {row["calls"] for row in stats["layers"]} == {computed}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_are_one_graph(maps_for: Callable[..., Any], fresh_compiler: None) -> None:
    """Softmax and linear layers share it: which one a layer is, the operator finds out."""
    model, inputs = tiny.wan(layers=10)
    linear = maps_for(model, [1, 4, 5, 9], inputs=inputs)
    handle = accelerate(model, Config(linear=linear))
    want = tiny.run(model, inputs)
    handle.reconfigure(Config(linear=linear))
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert tiny.relative(tiny.run(model, inputs), want) < 2e-6
    assert int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) <= 2  # the first block's input is transposed
    assert {row["calls"] for row in handle.stats()["layers"]} == {1}


@pytest.mark.parametrize("kind", ["wan", "hunyuan_video", "cogvideox"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(kind: str, checkpointing: bool, maps_for: Callable[..., Any]) -> None:
    model, inputs = build(kind, (3, 4, 4))
    linear = maps_for(model, [1], inputs=inputs)
    model.requires_grad_()
    with accelerate(model), watched(by_matrix(load_feature_maps(linear.weights, layers=[1]))):
        want = tiny.gradients(model, [inputs])
    handle = accelerate(model, Config(linear=linear))
    if checkpointing:
        model.enable_gradient_checkpointing()
    tiny.same_gradients(tiny.gradients(model, [inputs]), want, 5e-5)
    assert split(handle.stats())[0][0]["calls"] == 1  # recomputation does not count


def test_bf16_is_as_exact_as_the_matrix_in_bf16(maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=3)
    linear = maps_for(model, [1], inputs=inputs)
    maps = load_feature_maps(linear.weights, layers=[1])
    with accelerate(model), watched(by_matrix(maps)):
        truth = tiny.run(model, inputs)
    model, inputs = model.to(torch.bfloat16), tiny.cast(inputs, torch.bfloat16)
    with accelerate(model), watched(by_matrix(maps)):
        eager = tiny.run(model, inputs)
    accelerate(model, Config(linear=linear))
    tiny.exact_enough(tiny.run(model, inputs), eager, truth)


def test_copies_and_pickles(maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=3)
    stock = tiny.run(model, inputs)
    linear = maps_for(model, [2], inputs=inputs)
    accelerate(model, Config(linear=linear))
    want = tiny.run(model, inputs)
    twin = copy.deepcopy(model)
    accelerate(model, Config(linear=linear)).remove()
    assert torch.equal(tiny.run(twin, inputs), want)
    handle = accelerate(twin, Config(linear=linear))
    assert handle.stats()["linear"] == {"transformer": [2]} and handle.stats()["layers"][2]["calls"] == 1
    pickled = pickle.loads(pickle.dumps(twin))  # a pickle is the stock model
    assert tiny.relative(tiny.run(pickled, inputs), stock) < 2e-6


@pytest.mark.parametrize("on_unsupported", ["dense", "error"])
def test_a_linear_layer_never_falls_back_to_softmax(on_unsupported: Any, maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=2)
    linear = maps_for(model, [1], inputs=inputs)
    with accelerate(model, Config(linear=linear, on_unsupported=on_unsupported)):
        processor = model.blocks[1].attn1.processor
        with pytest.raises(RuntimeError, match=r"blocks.1.attn1 is linear.*mask.*take layer 1 out of linear.layers"):
            processor(
                model.blocks[1].attn1, torch.randn(1, 8, 32), None, torch.ones(1, 1, 8, 8, dtype=torch.bool), None
            )


def test_a_mask_over_frames_is_refused(maps_for: Callable[..., Any]) -> None:
    model, inputs = tiny.wan(layers=2)
    linear = maps_for(model, [1], inputs=inputs)
    with accelerate(model, Config(linear=linear)) as handle:
        q = torch.randn(1, 8, 2, 16)
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        with pytest.raises(RuntimeError, match=r"blocks.1.attn1 cannot run linear attention.*mask over frames"):
            handle.roots[0].session.attend(1, q, q, q, None, None, None, mask)


def test_a_scale_of_the_models_own(maps_for: Callable[..., Any]) -> None:
    """The map sees the q that has the same scores at the default scale."""
    model, inputs = tiny.wan(layers=2)
    linear = maps_for(model, [1], inputs=inputs)
    with accelerate(model, Config(linear=linear)) as handle, torch.no_grad():
        session = handle.roots[0].session
        q, k, v = torch.randn(3, 1, 20, 2, 16)
        plain = session.attend(1, q * 0.3, k, v, None, None)
        assert torch.equal(session.attend(1, q, k, v, None, None, 16**-0.5), session.attend(1, q, k, v, None, None))
        torch.testing.assert_close(session.attend(1, q, k, v, None, None, 0.3 * 16**-0.5), plain)
