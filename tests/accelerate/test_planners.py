"""Every planner with every model family, on odd grids, and inside what users combine a model with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from planner_settings import FAMILIES, GRID, MORE_FAMILIES, PLANNERS, SETTINGS, TIMES, build, config, plugged, setting
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.handle import Handle


def branch(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    return {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * (1 - 0.5 * number)}


def split(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """A generation with two guidance branches, one call each: outputs [step][branch] in a row."""
    return [tiny.run(model, tiny.at(branch(inputs, b), t)) for t in TIMES for b in range(2)]


def batched(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The same generation with both branches in one call."""
    rows = {}
    for key, value in inputs.items():
        both = [branch(inputs, b)[key] for b in range(2)]
        stack = isinstance(value, Tensor) and key != "image_rotary_emb"
        rows[key] = torch.cat(both) if stack else value
    return [part for t in TIMES for part in tiny.run(model, tiny.at(rows, t)).chunk(2)]


MEMORY = [
    *((planner, {}) for planner in PLANNERS),
    ("svg1", {"refresh": 0}),
    ("window", {"refresh": 1}),
    ("window", {"heads": "spatial"}),
]


@pytest.mark.parametrize(("planner", "knobs"), MEMORY)
def test_planners_say_whether_they_remember(planner: str, knobs: dict[str, Any]) -> None:
    """By what is kept after two steps, of which one is sparse."""
    model, inputs = build("wan")
    settings = config(planner, **knobs)
    handle = plugged(model, settings)
    for t in TIMES[:2]:
        tiny.run(model, tiny.at(inputs, t))
    assert settings.attention is not None
    assert settings.attention.remembers == bool(handle.roots[0].session.state)


def check_sparse(handle: Handle) -> None:
    for layer in handle.stats()["layers"]:
        assert not layer["fallbacks"] and layer["sparse_calls"] > 0, layer
        density = [d for d in layer["density"] if d is not None]  # None: a cache skipped the layer
        assert all(0 < d <= 1 for d in density) and min(density) < 0.95, density


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def far(got: list[Tensor], want: list[Tensor]) -> float:
    return max(tiny.relative(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("planner", PLANNERS)
def test_generations(planner: str, kind: str) -> None:
    """Sparse, finite, near the dense clip, twice the same; split and batched guidance agree; removed without trace."""
    model, inputs = build(kind)
    stock = split(model, inputs)
    handle = plugged(model, config(planner))
    first = split(model, inputs)
    check_sparse(handle)
    assert all(x.isfinite().all() for x in first)
    assert 1e-6 < far(first, stock) < 0.5
    assert same(split(model, inputs), first), "a second generation in the same process gives another clip"
    together = batched(model, inputs)
    assert far(together, first if setting(planner).alone else stock) < (1e-4 if setting(planner).alone else 0.5)
    handle.remove()
    assert same(split(model, inputs), stock)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("planner", PLANNERS)
def test_the_loosest_setting_is_dense_attention(planner: str, kind: str) -> None:
    loose = setting(planner).loose
    if loose is None:
        pytest.skip("no knob of this planner keeps everything")
    model, inputs = build(kind)
    stock = split(model, inputs)
    plugged(model, config(planner, **loose))
    assert far(split(model, inputs), stock) < 1e-4


@pytest.mark.parametrize("planner", PLANNERS)
def test_padding_changes_nothing(planner: str) -> None:
    """Neither a plan nor an output may depend on what lies in the padded text tokens."""
    model, inputs = build("hunyuan_video")
    plugged(model, config(planner))
    first = split(model, inputs)
    padding = inputs["encoder_attention_mask"] == 0
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].masked_fill(padding[..., None], 50.0)
    assert far(split(model, inputs), first) < 1e-5


@pytest.mark.parametrize("planner", PLANNERS)
def test_real_frame_size(planner: str) -> None:
    """480 x 832 pixels: 30 x 52 tokens, no multiple of anything a kernel likes."""
    model, inputs = FAMILIES["wan"]()
    inputs = tiny.regrid(inputs, (3, 30, 52))
    stock = tiny.run(model, tiny.at(inputs, TIMES[-1]))
    handle = plugged(model, config(planner))
    for t in TIMES[:3]:
        out = tiny.run(model, tiny.at(inputs, t))
    check_sparse(handle)
    assert out.isfinite().all() and tiny.relative(out, stock) < 2


@pytest.mark.parametrize("planner", PLANNERS)
def test_inside_first_block_cache(planner: str) -> None:
    from diffusers import FirstBlockCacheConfig

    def generate() -> list[Tensor]:
        out = []
        for t in (900.0, 500.0, 499.0, 498.0, 100.0):
            for number, name in enumerate(("cond", "uncond")):
                with model.cache_context(name):
                    out.append(tiny.run(model, tiny.at(branch(inputs, number), t)))
        return out

    model, inputs = tiny.wan(layers=3)
    inputs = tiny.regrid(inputs, GRID)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    handle = accelerate(model, config(planner))
    first = generate()
    calls = [layer["calls"] for layer in handle.stats()["layers"]]
    assert calls[0] == 10 and 4 <= calls[-1] < 10, "the cache must have skipped something"
    check_sparse(handle)
    assert all(x.isfinite().all() for x in first)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("planner", "kind", "blocks"),
    [
        ("draft", "wan_ti2v", ["blocks"]),
        ("window", "hunyuan_video", ["transformer_blocks", "single_transformer_blocks"]),
        ("rettention", "wan", ["blocks"]),  # observe, row_scale and residual
        ("svg1", "wan", ["blocks"]),  # orders per head
    ],
)
def test_compiled_blocks(planner: str, kind: str, blocks: list[str], fresh_compiler: None) -> None:
    model, inputs = build(kind)
    handle = plugged(model, config(planner))
    eager = split(model, inputs)
    for name in blocks:
        for block in getattr(model, name):
            block.compile(fullgraph=True, backend="aot_eager")
    assert far(split(model, inputs), eager) < 1e-5
    check_sparse(handle)


def test_gradients_are_those_of_finite_differences() -> None:
    model, inputs = build("hunyuan_video")
    plugged(model, config("window", heads="spatial", dense_steps=0))  # a plan that no weight changes
    weight = model.transformer_blocks[0].attn.to_k.weight.requires_grad_(True)

    def loss() -> Tensor:
        out: Tensor = model(**inputs)[0]
        return out.square().mean()

    loss().backward()
    slope = weight.grad
    assert slope is not None and slope.norm() > 0
    step = 0.02 * weight.detach().norm() / slope.norm() * slope
    with torch.no_grad():
        weight += step
        above = loss()
        weight -= 2 * step
        below = loss()
    assert float((above - below) / 2) == pytest.approx(float((slope * step).sum()), rel=0.02)


def test_every_planner_has_settings() -> None:
    for planner in PLANNERS:
        setting(planner)
    assert set(SETTINGS) <= set(PLANNERS), "settings of planners that do not exist"
