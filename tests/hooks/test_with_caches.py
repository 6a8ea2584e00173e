"""Hooks where a cache leaves work out: behind a block they see what is forecast, before that what was computed is kept
with what they did to it. Nothing counts twice, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.models.hooks import WHERE, HookPlace, HookRows

FAMILIES = ("wan_t2v", "cogvideox_5b", "hunyuan_video")


class Adding:
    """Adds a fixed pattern; counts its calls by step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: Any, place: HookPlace, rows: HookRows) -> Tensor:
        self.steps.append(step.step)
        wave = torch.linspace(0, 30, rows.video[0].numel()).sin().view(rows.video.shape[1:])
        return rows.video + 0.5 * wave


def forecast(family: str, granularity: str, where: str) -> tuple[Tensor, Tensor, Adding]:
    """A computed step's output, and that of the next with the same input, which is forecast."""
    model, inputs = tiny.build(family, layers=3) if family != "hunyuan_video" else tiny.build(family, layers=2)
    policy = TaylorSeer(granularity=granularity, order=0, first_full=1, last_full=0, interval=2)
    handle = accelerate(model, Config(cache=policy))
    hook = Adding()
    handle.hook(where, hook)
    outputs = []
    for step in range(2):
        with handle.step(step, timestep=500.0, num_steps=20):
            outputs.append(tiny.run(model, inputs))
    assert handle.stats()["cache"]["forecast"] == {1: 1}
    return outputs[0], outputs[1], hook


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_forecast_step_has_what_hooks_added(name: str, granularity: str, where: str) -> None:
    computed, forecasted, hook = forecast(name, granularity, where)
    assert tiny.relative(forecasted, computed) < 2e-6
    called = {step: hook.steps.count(step) for step in (0, 1)}
    assert called[0] > 0
    if granularity == "model" or where != "block_output":
        assert called[1] == 0  # what does not run calls no hook
    else:
        assert called[1] == called[0]  # behind blocks they see what is forecast
