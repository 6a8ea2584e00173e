"""MCM: Motion Consistency Model, Accelerating Video Diffusion with Disentangled Motion-Appearance Distillation
(arXiv 2406.06890).

The few-step student is a LoRA on the teacher: the projections of every attention are wrapped, and an adapter may be on,
off, scaled, or folded into the weights, before or after the projections are joined into one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SCALES = (1.0, 0.0, 0.5)
FAMILIES = ("animatediff", "wan_t2v", "cogvideox_5b", "hunyuan_video")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def student(family: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny.build(family)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False), "student")
    return model.eval().requires_grad_(False), inputs


def answers(model: nn.Module, inputs: dict[str, Any]) -> dict[str | float, Tensor]:
    """Outputs with the adapter at every scale, and switched off."""
    found: dict[str | float, Tensor] = {}
    for scale in SCALES:
        model.set_adapters("student", weights=scale)
        found[scale] = tiny.run(model, inputs)
    model.disable_adapters()
    found["off"] = tiny.run(model, inputs)
    model.enable_adapters()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_off_and_scaled(family):
    """The adapter is followed at every call, whatever was set when the model was accelerated."""
    model, inputs = student(family)
    stock = answers(model, inputs)
    truth = answers(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    assert torch.equal(stock["off"], stock[0.0])
    assert all(tiny.relative(stock[a], stock[b]) > 1e-2 for a, b in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0)))
    handle = accelerate(model)
    for setting, got in answers(model, inputs).items():
        tiny.exact_enough(got, stock[setting], truth[setting])
    assert all(layer["calls"] == len(stock) and not layer["fallbacks"] for layer in handle.stats()["layers"])
    handle.remove()
    assert all(torch.equal(got, stock[setting]) for setting, got in answers(model, inputs).items())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_folded_into_the_weights(family, scale):
    model, inputs = student(family)
    handle = accelerate(model)
    unfused = answers(model, inputs)
    model.set_adapters("student", weights=1.0)
    model.fuse_lora(lora_scale=scale)
    assert tiny.relative(tiny.run(model, inputs), unfused[scale]) < 1e-5
    model.unfuse_lora()
    model.set_adapters("student", weights=1.0)  # folding leaves its scale behind
    assert tiny.relative(tiny.run(model, inputs), unfused[1.0]) < 1e-5
    assert not any(layer["fallbacks"] for layer in handle.stats()["layers"])


@pytest.mark.parametrize("scale", SCALES)
def test_projections_joined_after_folding(scale):
    """One projection for q, k and v holds what the three with their adapters gave, before and after accelerate()."""
    model, inputs = student("wan_t2v")
    unfused = answers(model, inputs)[scale]
    model.set_adapters("student", weights=1.0)
    model.fuse_lora(lora_scale=scale)
    handle = accelerate(model)
    for block in model.blocks:
        block.attn1.fuse_projections()
    assert tiny.relative(tiny.run(model, inputs), unfused) < 1e-5
    handle.remove()
    handle = accelerate(model)
    assert tiny.relative(tiny.run(model, inputs), unfused) < 1e-5
    model.blocks[0].attn1.to_qkv.weight.data.mul_(1.5)  # the joined weights are those that count
    assert tiny.relative(tiny.run(model, inputs), unfused) > 1e-3
    assert all(layer["calls"] == 2 for layer in handle.stats()["layers"])
