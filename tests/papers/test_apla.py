"""APLA: Additional Perturbation for Latent Noise with Adversarial Training Enables Consistency (arXiv 2308.12605).

A small transformer of its own reads the latent noise of a video model and perturbs it. Both networks are in the
pipeline, and every attention of either is found.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from paper_checks import Operators
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate

pytest.importorskip("diffusers")

ROWS = 96  # of latent noise


class Perturbation(nn.Module):
    """A stand-in for the paper's small transformer: latent noise in, latent noise out, random weights."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        self.embed, self.head = nn.Linear(channels, width), nn.Linear(width, channels)
        self.blocks = nn.ModuleList(WanTransformerBlock(width, 2 * width, 2) for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = timestep.to(x.dtype).view(-1, 1, 1).expand(len(x), 6, x.shape[-1]) / 1000
        for block in self.blocks:
            x = block(x, x, time, None)
        return hidden_states + 0.1 * self.head(x)


class Plain(nn.Module):
    """The same job by a transformer of torch alone, which no adapter knows."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(channels, 3 * width), nn.Linear(width, channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return hidden_states + 0.1 * self.head(x)


def pipeline(kind: type[nn.Module]) -> tuple[Any, dict[str, Any]]:
    unet, inputs = tiny.build("animatediff")
    torch.manual_seed(2)
    return SimpleNamespace(unet=unet, perturbation=kind(4).eval().requires_grad_(False)), inputs


def step(pipe: Any, inputs: dict[str, Any]) -> Tensor:
    """One step on perturbed noise."""
    noise = inputs["sample"]
    rows = noise.flatten(3).permute(0, 2, 3, 1).flatten(1, 2)  # [batch, frames · places, channels]
    with torch.no_grad():
        rows = pipe.perturbation(rows, inputs["timestep"].expand(len(rows)))
        noise = rows.unflatten(1, (noise.shape[2], -1)).permute(0, 3, 1, 2).reshape(noise.shape)
    return tiny.run(pipe.unet, {**inputs, "sample": noise})


def doubled(pipe: Any, inputs: dict[str, Any]) -> Tensor:
    twin = SimpleNamespace(**{name: copy.deepcopy(model).double() for name, model in vars(pipe).items()})
    return step(twin, tiny.cast(inputs, torch.float64))


def attention_modules(model: nn.Module) -> set[str]:
    """Modules with an attention processor that is no cross-attention to text."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "processor")}
    return {name for name, module in found.items() if not getattr(module, "is_cross_attention", False)}


def test_every_attention_of_both_networks_is_served():
    pipe, inputs = pipeline(Perturbation)
    eager, truth = step(pipe, inputs), doubled(pipe, inputs)
    found = {name: attention_modules(model) for name, model in vars(pipe).items()}
    assert all(found.values())
    handle = accelerate(pipe)
    served = {name: set(tiny.served(model)) for name, model in vars(pipe).items()}
    assert served == found
    layers = handle.stats()["layers"]
    assert len(layers) == sum(map(len, found.values()))
    assert {layer["expert"] for layer in layers} == {"unet", "perturbation"}
    tiny.exact_enough(step(pipe, inputs), eager, truth)
    assert all(layer["calls"] == 1 and not layer["fallbacks"] for layer in handle.stats()["layers"])
    handle.remove()
    assert not any(tiny.served(model) for model in vars(pipe).values()) and torch.equal(step(pipe, inputs), eager)


def test_a_network_that_no_adapter_knows_beside_one_that_is():
    """accelerate() leaves it alone, patch_sdpa serves it; neither disturbs the other."""
    pipe, inputs = pipeline(Plain)
    eager, truth = step(pipe, inputs), doubled(pipe, inputs)
    handle = accelerate(pipe)
    assert {layer["expert"] for layer in handle.stats()["layers"]} == {"transformer"}
    patched = vdit_fast.patch_sdpa(pipe.perturbation)
    with Operators() as operators:
        tiny.exact_enough(step(pipe, inputs), eager, truth)
    assert patched.stats()["served"] == {"attention": 1} and not patched.stats()["passed"]
    # torch's own attention ran where the report says so: in cross-attention to text
    assert operators.ran["attention"] + operators.ran["short_attention"] == 1 + len(handle.stats()["layers"])
    assert set(handle.stats()["skipped"]) == {"cross-attention"}
    handle.remove(), patched.remove()
    assert torch.equal(step(pipe, inputs), eager)
