"""DiffSynth: Latent In-Iteration Deflickering for Realistic Video Synthesis (arXiv 2308.03463).

Between denoising steps the frames' latents are blended with each other. A step's input is then not what the step before
left behind: whatever is kept of earlier steps must not stand in for it in an exact run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import FirstBlock, TaylorSeer, TeaCache
from vdit_fast.config import Config
from vdit_fast.planners import Draft

pytest.importorskip("diffusers")

STEPS = 6
EXACT = {
    "exact": Config(),
    "eager rounding": Config(fuse="eager"),
    "text_kv": Config(text_kv=True),
    "a cache that computes all": Config(cache=TaylorSeer(first_full=0, last_full=0, interval=1)),
    "patches": Config(attention=Draft(sparsity=0.5, pool=(2, 2))),
    "depends on the step": Config(attention=tiny.Band(width=2, dense_steps=0.5)),
}
ADAPTIVE = {
    "first block": FirstBlock(threshold=0.05, first_full=1, last_full=0, interval=8, granularity="span"),
    "modulated input": TeaCache(threshold=0.05, first_full=1, last_full=0, interval=8),
}
Edit = Callable[[Tensor, int], Tensor]


def blended(x: Tensor, step: int) -> Tensor:
    """Every frame's latents mixed with its neighbours', every second step."""
    mixed = (x.roll(1, 2) + x + x.roll(-1, 2)) / 3
    return mixed if step % 2 else x


def noised(x: Tensor, step: int) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))


class Pipeline:
    """Euler steps over a random tiny Wan, with an edit of the latents between steps."""

    def __init__(self, transformer: nn.Module, inputs: dict[str, Any]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.inputs = transformer, inputs
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)

    def run(self, edit: Edit | None, alone: Callable[[nn.Module], nn.Module] | None = None) -> list[Tensor]:
        """Outputs of the transformer; ``alone`` makes a model that knows nothing of earlier steps for each."""
        x, outputs = self.inputs["hidden_states"], []
        for step in range(STEPS):
            x = x if edit is None else edit(x, step)
            model = self.transformer if alone is None else alone(self.transformer)
            timestep = self.scheduler.timesteps[step]
            outputs.append(tiny.run(model, {**self.inputs, "hidden_states": x, "timestep": timestep.expand(1)}))
            x = x + (self.scheduler.sigmas[step + 1] - self.scheduler.sigmas[step]) * outputs[-1]
        return outputs


def pipeline() -> Pipeline:
    model, inputs = tiny.wan()
    return Pipeline(model, {**inputs, "encoder_hidden_states": torch.randn(1, 9, 16)})


@pytest.mark.parametrize("edit", [blended, noised])
@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_latents_changed_between_steps_exactly(config: Config, edit: Edit) -> None:
    """Bit by bit what models answer that have seen no earlier step."""
    pipe = pipeline()
    stock = copy.deepcopy(pipe.transformer)
    handle = accelerate(pipe, config)
    plain = pipe.run(None)
    got = pipe.run(edit)

    def alone(_: nn.Module) -> nn.Module:
        twin = copy.deepcopy(stock)
        holder = Pipeline(twin, pipe.inputs)
        holder.scheduler = pipe.scheduler
        keep.append(holder)
        accelerate(holder, config)
        return twin

    keep: list[Pipeline] = []
    want = pipe.run(edit, alone)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert tiny.relative(got[-1], plain[-1]) > 1e-2
    assert handle.stats()["generations"] == 2 and handle.stats()["steps"] == STEPS


def test_editing_does_not_shift_the_steps() -> None:
    """Steps come from the schedule: which are dense is the same with and without an edit."""
    pipe = pipeline()
    handle = accelerate(pipe, EXACT["depends on the step"])
    for edit in (None, blended, noised):
        pipe.run(edit)
        (root,) = handle.roots
        assert [step for layer, step, *_ in root.session.state["seen"] if layer == 0] == [3, 4, 5]


@pytest.mark.parametrize("policy", ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive_caches_see_the_edit(policy: Any) -> None:
    """The same latents again are forecast; noise added in between is noticed, and the step computed."""
    model, inputs = tiny.wan()
    handle = accelerate(model, Config(cache=policy))
    outputs, x = [], inputs["hidden_states"]
    for step in range(4):
        x = noised(x, step) if step == 2 else x
        with handle.step(step, timestep=500.0, num_steps=20):
            outputs.append(tiny.run(model, {**inputs, "hidden_states": x}))
    cache = handle.stats()["cache"]
    assert cache["forecast"] == {1: 1, 3: 1} and sum(cache["full"].values()) == 2
    assert any("change" in reason for reason in cache["full"])
    handle.reconfigure(Config())
    exact = tiny.run(model, {**inputs, "hidden_states": x})
    assert torch.equal(outputs[2], exact) and tiny.relative(outputs[1], exact) > 1e-2
    assert tiny.relative(outputs[3], exact) < 1e-5


def test_the_stock_models_answer() -> None:
    pipe = pipeline()
    want = pipe.run(blended)
    accelerate(pipe)
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(pipe.run(blended), want, strict=True))
