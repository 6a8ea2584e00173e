"""W2SD: Weak-to-Strong Diffusion with Reflection (arXiv 2502.00473).

In the first steps a strong model denoises, a weak one goes the same step back, and the strong one takes it again. One
step is evaluated three times, once backwards, by two models: a count of calls, or a rule "more noise is a new clip",
would take each for something else.
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
from vdit_fast.caching import FirstBlock, TaylorSeer
from vdit_fast.config import Config
from vdit_fast.handle import Handle

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

BUDGET = 48
"""Evaluations T of the plain sampler, which W2SD is allowed too."""

FORECASTING = {
    "outputs": TaylorSeer(first_full=1, last_full=0, interval=3),
    "blocks": TaylorSeer(first_full=1, last_full=0, interval=3, granularity="block"),
    "modules": TaylorSeer(first_full=1, last_full=0, interval=3, granularity="module"),
    "first block": FirstBlock(first_full=1, last_full=0, threshold=10.0),
}

Velocity = Callable[[Tensor, int, float, str], Tensor]
"""Of latents at the noise level of a step, by the model of a name."""


def reflect(x: Tensor, step: int, sigmas: Tensor, velocity: Velocity) -> Tensor:
    """Denoise by the strong model, invert by the weak one; Euler steps of a flow."""
    now, after = float(sigmas[step]), float(sigmas[step + 1])
    denoised = x + (after - now) * velocity(x, step, now, "strong")
    return denoised - (after - now) * velocity(denoised, step, after, "weak")


def w2sd(x: Tensor, sigmas: Tensor, velocity: Velocity) -> list[Tensor]:
    """Latents before every step and after the last."""
    trail, steps = [x], len(sigmas) - 1
    for step in range(steps):
        latents = reflect(trail[-1], step, sigmas, velocity) if step < steps // 2 else trail[-1]
        delta = float(sigmas[step + 1] - sigmas[step])
        trail.append(latents + delta * velocity(latents, step, float(sigmas[step]), "strong"))
    return trail


def schedule(budget: int = BUDGET) -> Tensor:
    return torch.linspace(1, 0, budget // 2 + 1)


def pair(layers: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """One tiny Wan that is strong with its adapter and weak without."""
    model, inputs = tiny.wan(layers=layers)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model.add_adapter(config, "strong")
    inputs["encoder_hidden_states"] = torch.randn(1, 9, 16)
    return model.eval().requires_grad_(False), inputs


class Sampler:
    """Runs one transformer under two names and records which evaluation came when."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], handle: Handle | None, steps: int) -> None:
        self.model, self.inputs, self.handle, self.steps = model, inputs, handle, steps
        self.trace: list[tuple[int, str]] = []

    def __call__(self, x: Tensor, step: int, sigma: float, name: str) -> Tensor:
        (self.model.enable_adapters if name == "strong" else self.model.disable_adapters)()  # type: ignore[operator]
        inputs = {**tiny.at(self.inputs, 1000 * sigma), "hidden_states": x}
        self.trace.append((step, name))
        if self.handle is None:
            return tiny.run(self.model, inputs)
        with self.handle.step(step, sigma=sigma, model=name, num_steps=self.steps):
            return tiny.run(self.model, inputs)


def sampled(config: Config | None, budget: int = BUDGET) -> tuple[list[Tensor], Sampler]:
    model, inputs = pair()
    handle = None if config is None else accelerate(model, config)
    sampler = Sampler(model, inputs, handle, budget // 2)
    return w2sd(torch.randn(inputs["hidden_states"].shape), schedule(budget), sampler), sampler


def test_two_equal_models_of_constant_velocity_reflect_onto_the_same_place() -> None:
    """W2, through a served model whose output does not hang on its input."""
    model, inputs = tiny.wan(layers=1)
    with torch.no_grad():
        model.get_submodule("proj_out").weight.zero_()  # type: ignore[union-attr, operator]
    handle = accelerate(model)
    sigmas, x = schedule(), inputs["hidden_states"]

    def velocity(x: Tensor, step: int, sigma: float, name: str) -> Tensor:
        with handle.step(step, sigma=sigma, model=name):
            return tiny.run(model, {**tiny.at(inputs, 1000 * sigma), "hidden_states": x})

    assert velocity(x, 0, 1.0, "strong").abs().max() > 0
    torch.testing.assert_close(reflect(x, 3, sigmas, velocity), x, atol=1e-6, rtol=0)


def test_the_shift_is_the_step_times_the_difference_of_velocities() -> None:
    """W2b."""
    model, inputs = pair()
    sampler = Sampler(model, inputs, accelerate(model), BUDGET // 2)
    sigmas, x = schedule(), inputs["hidden_states"]
    now, after = float(sigmas[3]), float(sigmas[4])
    strong = sampler(x, 3, now, "strong")
    weak = sampler(x + (after - now) * strong, 3, after, "weak")
    shift = reflect(x, 3, sigmas, sampler) - x
    torch.testing.assert_close(shift, (after - now) * (strong - weak), atol=1e-6, rtol=1e-4)
    assert shift.abs().max() > 1e-4


def test_which_model_is_evaluated_at_which_step() -> None:
    """24 steps, the first 12 with two evaluations more, by the served model and by what a hook is told."""
    model, inputs = pair()
    handle = accelerate(model, Config(attention=tiny.Band(width=3, dense_steps=6)))
    told: list[tuple[int, str]] = []
    handle.hook("attention_output", lambda step, place, rows: told.append((step.step, step.expert)))
    sampler = Sampler(model, inputs, handle, BUDGET // 2)
    w2sd(inputs["hidden_states"], schedule(), sampler)
    want: list[tuple[int, str]] = []
    for step in range(24):
        want += [(step, "strong"), (step, "weak"), (step, "strong")] if step < 12 else [(step, "strong")]
    assert len(want) == 24 + 2 * 12 == BUDGET
    assert sampler.trace == told == want
    stats = handle.stats()
    assert stats["generations"] == 1 and stats["steps"] == 24 and stats["host_reads"] == 0
    (layer,) = stats["layers"]
    assert layer["sparse_calls"] == BUDGET - 6 * 3  # the rule speaks of steps, not of calls


def test_a_step_derived_from_the_noise_would_begin_a_new_clip_at_every_reflection() -> None:
    """Why the step has to be named: going on after going back looks like another clip."""
    model, inputs = pair()
    handle = accelerate(model)
    sampler = Sampler(model, inputs, None, BUDGET // 2)
    w2sd(inputs["hidden_states"], schedule(), sampler)
    assert handle.stats()["generations"] > 1


@pytest.mark.parametrize("attention", [None, tiny.Band(width=3, dense_steps=0.25)], ids=["dense", "sparse"])
def test_a_cache_that_computes_everything_changes_no_bit(attention: Any) -> None:
    torch.manual_seed(3)
    want, _ = sampled(Config(attention=attention), budget=16)
    torch.manual_seed(3)
    got, sampler = sampled(Config(attention=attention, cache=TaylorSeer(first_full=0, last_full=0, interval=1)), 16)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert sampler.handle is not None and not sampler.handle.stats()["cache"]["forecast"]


@pytest.mark.parametrize("policy", FORECASTING.values(), ids=FORECASTING)
def test_the_weak_models_features_never_feed_the_strong_one(policy: Any) -> None:
    """A cache that forecasts: the strong model's outputs are those of a run in which the weak one has a model of its
    own."""
    config = Config(cache=policy)
    torch.manual_seed(3)
    model, inputs = pair(layers=2)
    start = torch.randn(inputs["hidden_states"].shape)
    apart = [
        Sampler(twin, inputs, accelerate(twin, config), 8) for twin in (copy.deepcopy(model), copy.deepcopy(model))
    ]
    want_trail = w2sd(start, schedule(16), lambda x, step, sigma, name: apart[name == "weak"](x, step, sigma, name))
    one = Sampler(model, inputs, accelerate(model, config), 8)
    trail = w2sd(start, schedule(16), one)
    assert one.handle is not None and sum(one.handle.stats()["cache"]["forecast"].values()) > 0
    assert all(torch.equal(a, b) for a, b in zip(trail, want_trail, strict=True))


def test_the_stock_models_answer() -> None:
    torch.manual_seed(3)
    want, _ = sampled(None, budget=16)
    torch.manual_seed(3)
    got, _ = sampled(Config(), budget=16)
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
