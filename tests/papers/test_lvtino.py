"""LVTINO: LAtent Video consisTency INverse sOlver for High Definition Video Restoration (arXiv 2510.01339).

A video consistency model is called a few times at noise levels of the solver's choosing, with steps in pixel space in
between; no gradients. Nothing may be taken over from one call to the next.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.planners import SVG2, AdaSpa, Draft, Rettention

pytest.importorskip("diffusers")

TIMESTEPS = (700.0, 200.0, 900.0)
CACHE = TaylorSeer(first_full=0.3, last_full=1, interval=2, min_steps=9)
CONFIGS = {
    "exact": Config(),
    "depends on the noise": Config(attention=tiny.Band(width=2, dense_steps=0.5)),
    "patches": Config(attention=Draft(sparsity=0.5, pool=(2, 2))),
    "cache": Config(cache=CACHE),
    "text_kv": Config(text_kv=True),
}
REMEMBER = {
    "remembers statistics": Config(attention=Rettention(window=0.3, dense_steps=0, interval=4)),
    "remembers centroids": Config(attention=SVG2(top_p=0.7, q_clusters=4, k_clusters=6)),
    "remembers a search": Config(attention=AdaSpa(sparsity=0.5, block=8, dense_steps=0)),
}


def proximal(x: Tensor, measured: Tensor, weight: float) -> Tensor:
    """The minimum of |x - z|² + weight · |mean over frames of z - measured|², in closed form."""
    misfit = measured - x.mean(2, keepdim=True)
    return x + weight / (weight + x.shape[2]) * misfit


def solve(model: nn.Module, inputs: dict[str, Any], call: Any) -> list[tuple[Tensor, float, Tensor]]:
    """(latents, timestep, output) of every evaluation; measurement steps in between."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(inputs["hidden_states"].shape, generator=generator)
    measured = torch.randn(x[:, :, :1].shape, generator=generator)
    trail = []
    with torch.no_grad():
        for timestep in TIMESTEPS:
            sigma = timestep / 1000
            noisy = (1 - sigma) * x + sigma * torch.randn(x.shape, generator=generator)
            output = call(noisy, timestep)
            trail.append((noisy, timestep, output))
            x = proximal(noisy - sigma * output, measured, weight=5.0)
    return trail


def model_and_inputs() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny.wan()
    return model, {**inputs, "encoder_hidden_states": torch.randn(1, 9, 16)}


def fresh_answer(model: nn.Module, inputs: dict[str, Any], config: Config, noisy: Tensor, timestep: float) -> Tensor:
    twin = copy.deepcopy(model)
    handle = accelerate(twin, config)
    with handle.step(None, timestep=timestep):
        return tiny.run(twin, {**tiny.at(inputs, timestep), "hidden_states": noisy})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_evaluation_is_a_fresh_models(config: Config) -> None:
    """Timesteps 700, 200, 900: bit by bit what a model answers that was never called before."""
    model, inputs = model_and_inputs()
    stock = copy.deepcopy(model)
    handle = accelerate(model, config)

    def call(noisy: Tensor, timestep: float) -> Tensor:
        with handle.step(None, timestep=timestep):
            return tiny.run(model, {**tiny.at(inputs, timestep), "hidden_states": noisy})

    for noisy, timestep, output in solve(model, inputs, call):
        assert torch.equal(output, fresh_answer(stock, inputs, config, noisy, timestep))
    stats = handle.stats()
    assert stats["generations"] == 1 and stats["host_reads"] == 0
    assert stats["cache"] is None or stats["cache"]["full"] == {"the denoising step is unknown": 3}
    if config.attention is not None and config.attention.dense_steps:
        assert all(layer["sparse_calls"] == 1 for layer in stats["layers"])  # at 200: sigma says what the step cannot


@pytest.mark.parametrize("config", REMEMBER.values(), ids=REMEMBER)
def test_methods_that_remember_are_told_that_evaluations_are_unrelated(config: Config) -> None:
    model, inputs = model_and_inputs()
    stock = copy.deepcopy(model)
    handle = accelerate(model, config)

    def call(noisy: Tensor, timestep: float) -> Tensor:
        handle.reset()
        with handle.step(None, timestep=timestep):
            return tiny.run(model, {**tiny.at(inputs, timestep), "hidden_states": noisy})

    for noisy, timestep, output in solve(model, inputs, call):
        assert torch.equal(output, fresh_answer(stock, inputs, config, noisy, timestep))


@pytest.mark.parametrize(
    "config", [CONFIGS["exact"], CONFIGS["patches"], CONFIGS["cache"]], ids=["exact", "patches", "cache"]
)
def test_without_being_told_as_well(config: Config) -> None:
    """A plain loop: rising noise begins a clip, and a schedule nobody knows is computed."""
    model, inputs = model_and_inputs()
    stock = copy.deepcopy(model)
    handle = accelerate(model, config)
    trail = solve(model, inputs, lambda x, t: tiny.run(model, {**tiny.at(inputs, t), "hidden_states": x}))
    for noisy, timestep, output in trail:
        assert torch.equal(output, fresh_answer(stock, inputs, config, noisy, timestep))
    assert handle.stats()["generations"] == 2


def test_no_graph_is_recorded() -> None:
    model, inputs = model_and_inputs()
    accelerate(model.requires_grad_(False))
    out = model(**inputs)[0]
    assert not out.requires_grad and out.grad_fn is None
