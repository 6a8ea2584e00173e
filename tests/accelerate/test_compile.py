"""torch.compile: one graph for all layers, no recompilation, the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import tiny
import torch
from tiny import Band

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config

WAN = 2 if diffusers.__version__.startswith("0.35.") else 1
"""Graphs of Wan's blocks: diffusers 0.35 hands the first one a transposed view, and ours returns contiguous rows."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compile_blocks(model: Any, *names: str, **kw: Any) -> None:
    for name in names:
        for block in getattr(model, name):
            block.compile(fullgraph=True, **kw)


@pytest.mark.parametrize(
    ("kind", "sizes", "blocks", "expected"),
    [
        ("wan_t2v", {"layers": 10}, ["blocks"], WAN),
        # The stock blocks need as many: the first block of a class gets a slice with strides of its own.
        ("hunyuan_video", {"layers": 1, "single": 10}, ["transformer_blocks", "single_transformer_blocks"], 3),
        ("cogvideox_5b", {"layers": 10}, ["transformer_blocks"], 1),
        ("mochi", {"layers": 10}, ["transformer_blocks"], 2),  # the last block ends the text stream
        *(
            pytest.param(kind, {"layers": 10}, ["transformer_blocks"], expected, marks=pytest.mark.slow)
            for kind, expected in {
                "ltx_video": 1,
                "ltx2": 1,
                "ltx2_3": 1,
                "cosmos_1": 1,
                "cosmos_2": 1,
                "allegro": 1,
                "consisid": 2,  # like the stock blocks
                "easyanimate": 3,  # with and without projections for the text; the first block gets a transposed view
            }.items()
        ),
    ],
)
def test_ten_layers_share_one_graph(kind: str, sizes: dict[str, int], blocks: list[str], expected: int) -> None:
    model, inputs = tiny.build(kind, **sizes)
    handle = accelerate(model, Config(attention=Band(width=3)))
    eager = [tiny.run(model, tiny.at(inputs, t)) for t in (900, 500)]
    handle.reset()
    # What comes after tracing sees the same operator in every family: a joint and a video-only one show it.
    compile_blocks(model, *blocks, backend="aot_eager" if kind in ("wan_t2v", "hunyuan_video") else "eager")
    compiled = [tiny.run(model, tiny.at(inputs, t)) for t in (900, 500)]
    assert graphs() == expected
    for got, want in zip(compiled, eager, strict=True):
        assert tiny.relative(got, want) < 1e-5
    layers = handle.stats()["layers"]
    assert all(layer["sparse_calls"] + sum(layer["dense"].values()) == 4 for layer in layers)
    assert sum(layer["sparse_calls"] == 4 for layer in layers) >= 10 and not any(layer["fallbacks"] for layer in layers)


@pytest.mark.parametrize("fuse", ["off", "fast"])
@pytest.mark.parametrize(
    ("kind", "blocks", "expected"),
    [
        ("wan_t2v", ["blocks"], WAN),
        pytest.param("latte", ["transformer_blocks", "temporal_transformer_blocks"], 3, marks=pytest.mark.slow),
        pytest.param("lumina_next", ["layers"], 1, marks=pytest.mark.slow),
    ],
)
def test_stock_and_fused_blocks_make_as_many_graphs(kind: str, blocks: list[str], expected: int, fuse: Any) -> None:
    """The compiler takes the classes of some blocks as a whole, and does not look for their forward in there."""
    if kind == "wan_t2v" and fuse == "off":
        expected = 1  # the stock blocks hand on the strides that they get
    model, inputs = tiny.build(kind, layers=4)
    accelerate(model, Config(fuse=fuse))
    want = tiny.run(model, inputs)
    compile_blocks(model, *blocks, backend="eager")
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-5 and graphs() == expected


@pytest.mark.slow
def test_perturbed_blocks_of_ltx2_have_no_graph_break() -> None:
    model, inputs = tiny.build("ltx2_3", layers=2)
    inputs |= {"spatio_temporal_guidance_blocks": [1]}
    stock = tiny.run(model, inputs)
    accelerate(model)
    compile_blocks(model, "transformer_blocks", backend="eager")  # the stock block asks a tensor whether to attend
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5


def test_compile_repeated_blocks() -> None:
    model, inputs = tiny.wan(layers=10)
    stock = tiny.run(model, inputs)
    handle = accelerate(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-5
    assert graphs() == WAN
    assert [layer["calls"] for layer in handle.stats()["layers"]] == [1] * 10


def test_the_whole_transformer_without_graph_breaks() -> None:
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model, Config(attention=Band(width=3)))
    eager = [tiny.run(model, tiny.at(inputs, t)) for t in (900, 900, 500)]
    handle.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    compiled = [tiny.run(model, tiny.at(inputs, t)) for t in (900, 900, 500)]
    assert graphs() == 2  # Module.compile() compiles the pre-hook and the forward
    for got, want in zip(compiled, eager, strict=True):
        assert tiny.relative(got, want) < 1e-5
    seen = handle.roots[0].session.state["seen"]
    assert seen == [
        (layer, step, branch, "transformer") for step, branch in ((0, 0), (0, 1), (1, 0)) for layer in range(3)
    ]


def test_training_through_compiled_blocks() -> None:
    model, inputs = tiny.wan()
    model.requires_grad_(True)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return model.blocks[0].attn1.to_q.weight.grad.clone()

    stock = gradient()
    accelerate(model)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert float((gradient() - stock).norm()) < 2e-5 * float(stock.norm())


def test_operator_registration() -> None:
    model, inputs = tiny.wan()
    accelerate(model)
    tiny.run(model, inputs)
    handle = model.blocks[0].attn1.processor.handle
    q, k, v = (torch.randn(1, 48, 2, 16) for _ in range(3))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for kv_len in (None, torch.tensor([40], dtype=torch.int32)):
        for scale in ((), (0.3,)):
            arguments = (q, k, v, kv_len, handle, *scale)
            torch.library.opcheck(torch.ops.vdit_fast.served_attention, arguments, test_utils=checks)


@pytest.mark.slow
def test_inductor() -> None:
    model, inputs = tiny.wan(layers=10)
    stock = tiny.run(model, inputs)
    accelerate(model)
    model.compile_repeated_blocks(fullgraph=True)
    assert tiny.relative(tiny.run(model, inputs), stock) < 1e-4
    assert graphs() == WAN
