"""Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets (arXiv 2311.15127).

An image UNet whose every spatial block is followed by a temporal one: up to 18,432 sequences of 14 or 25 frames, heads
of 64 columns, and cross-attention to a single key; a learned alpha mixes the two.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from paper_checks import Operators, as_exact_as_torch

import vdit_fast
from vdit_fast.accelerate import accelerate

pytest.importorskip("diffusers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("places", "frames", "heads"), [(18_432, 14, 1), (2304, 25, 1), (144, 14, 4)])
def test_temporal_attention_of_every_level(places, frames, heads, dtype):
    """Tokens [frames, places, heads, dim] as the spatial layers leave them, attended to along the frames in place."""
    q, k, v = torch.randn(3, 1, frames, places, heads, 64).to(dtype).unbind()
    with Operators() as operators:
        got = vdit_fast.short_attention(q, k, v)
    assert operators.ran == {"short_attention": 1}
    assert got.stride() == q.stride()  # [frames, places, ...] again: nothing was transposed
    few = torch.arange(places) if places < 1000 else torch.randperm(places)[:100]
    rows = [x[0].transpose(0, 1)[few] for x in (q, k, v)]
    as_exact_as_torch(got[0].transpose(0, 1)[few], *rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 14])
def test_one_key_gives_its_value(queries, dtype):
    """The softmax over one key is 1: the output is v, bit for bit."""
    q, k, v = (torch.randn(2, n, 144, 5, 64).to(dtype) for n in (queries, 1, 1))
    assert torch.equal(vdit_fast.short_attention(q, 30 * k, v), v.expand_as(q))


def test_the_unet_is_served_whole():
    model, inputs = tiny.build("svd")
    stock = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    handle = accelerate(model)
    with Operators() as operators:
        got = tiny.run(model, inputs)
    tiny.exact_enough(got, stock, truth)
    stats = handle.stats()
    names = {name for name, module in model.named_modules() if hasattr(module, "processor")}
    assert {layer["name"] for layer in stats["layers"]} == names and not stats["skipped"]
    assert all(layer["calls"] == 1 and not layer["fallbacks"] for layer in stats["layers"])
    assert operators.ran["short_attention"] + operators.ran["attention"] == len(names) and not operators.ran["torch"]
    temporal = [name for name in names if "temporal_transformer_blocks" in name]
    assert len(temporal) == len(names) // 2 and operators.ran["short_attention"] >= len(temporal)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)


def test_cross_attention_needs_no_queries():
    """Only the value's projection of the one CLIP token is computed."""
    model, inputs = tiny.build("svd")
    accelerate(model)
    calls: dict[str, int] = {"to_q": 0, "to_k": 0, "to_v": 0}

    def count(name: str) -> Any:
        def hook(*call: Any) -> None:
            calls[name] += 1

        return hook

    crossing = [module for module in model.modules() if getattr(module, "is_cross_attention", False)]
    for module in crossing:
        for name in calls:
            getattr(module, name).register_forward_hook(count(name))
    tiny.run(model, inputs)
    assert crossing and calls == {"to_q": 0, "to_k": 0, "to_v": len(crossing)}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_mixes_what_the_two_attentions_gave(alpha):
    """At either end one of them is left out, and the served one of the other kind is still called and still exact."""
    model, inputs = tiny.build("svd")
    for module in model.modules():
        if type(module).__name__ == "AlphaBlender":
            module.mix_factor.data.fill_(50.0 if alpha else -50.0)
    stock = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    handle = accelerate(model)
    tiny.exact_enough(tiny.run(model, inputs), stock, truth)
    assert all(layer["calls"] == 1 for layer in handle.stats()["layers"])
