"""Feature caches beside planners that remember: steps and layers that never ask them leave nothing wrong behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from planner_settings import PLANNERS, config
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import CachePolicy, DeltaDiT, TaylorSeer
from vdit_fast.config import Config
from vdit_fast.context import StepContext
from vdit_fast.handle import Handle
from vdit_fast.planners import AdaSpa, Rettention, from_dict
from vdit_fast.planners.watching import Watching

TIMES = (900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0)
WARM = {"svg2"}
"""Starts its clusters where the last call left them: another call than without a cache, and other clusters."""
KNOBS: dict[str, Any] = {"first_full": 2, "last_full": 0, "interval": 3}
POLICIES: dict[str, CachePolicy] = {
    "model": TaylorSeer(granularity="model", **KNOBS),
    "module": TaylorSeer(granularity="module", **KNOBS),
    "span": TaylorSeer(granularity="span", blocks=(1, 3), **KNOBS),
    "delta_dit": DeltaDiT(bound=5, length=1, **KNOBS),
}


def plugged(model: nn.Module, settings: Config) -> Handle:
    scheduler = SimpleNamespace(timesteps=torch.tensor(TIMES))
    return accelerate(SimpleNamespace(transformer=model, scheduler=scheduler), settings)


def generate(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return [tiny.run(model, tiny.at(inputs, t)) for t in TIMES]


def built() -> tiny.Built:
    model, inputs = tiny.wan(layers=4)
    return model, tiny.regrid(inputs, (3, 6, 7))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("planner", PLANNERS)
def test_computed_steps_have_the_bits_of_a_run_without_a_cache(planner: str, policy: str) -> None:
    """The inputs of a step do not depend on earlier outputs here: a planner that counted calls, or searched later
    because a step was forecast, would compute other bits."""
    model, inputs = built()
    dense = config(planner)
    with plugged(model, dense):
        plain = generate(model, inputs)
    with plugged(model, Config(attention=dense.attention, cache=POLICIES[policy], on_unsupported="error")) as handle:
        for _ in range(2):
            handle.reset()
            got = generate(model, inputs)
            forecast = handle.stats()["cache"]["forecast"]
            assert 2 <= len(forecast) < 6
            same = [torch.equal(a, b) for a, b in zip(got, plain, strict=True)]
            if planner not in WARM:
                assert [step for step, equal in enumerate(same) if not equal] == sorted(forecast)
            assert all(bool(x.isfinite().all()) for x in got)


@pytest.mark.parametrize("planner", ["adaspa", "rettention"])
def test_steps_in_which_planners_look_are_computed(planner: str) -> None:
    model, inputs = built()
    settings = config(planner)
    policy = TaylorSeer(first_full=2, last_full=0, interval=9)
    with plugged(model, Config(attention=settings.attention, cache=policy)) as handle:
        generate(model, inputs)
        stats = handle.stats()["cache"]
    looks = {"adaspa": "adaspa searches in this step", "rettention": "rettention measures in this step"}[planner]
    # dense_steps 1; adaspa searches in steps 1 and 3, rettention measures in 1, 4, 7
    assert stats["full"][looks] == {"adaspa": 1, "rettention": 2}[planner]
    assert sorted(stats["forecast"]) == {"adaspa": [2, 4, 5, 6, 7], "rettention": [2, 3, 5, 6]}[planner]


def step(index: int, total: int | None = 50) -> StepContext:
    return StepContext(step=index, num_steps=total)


def test_which_steps_those_are() -> None:
    assert [s for s in range(50) if AdaSpa().observes(step(s))] == [10, 30]
    assert [s for s in range(50) if AdaSpa(dense_steps=15, search=(10, 30)).observes(step(s, None))] == [15, 30]
    assert not any(AdaSpa().observes(step(s, None)) for s in range(-1, 50))
    assert [s for s in range(50) if Rettention().observes(step(s))] == [15, 20, 25, 30, 35, 40, 45]
    assert [s for s in range(9) if Rettention(dense_steps=0, interval=4).observes(step(s, None))] == [0, 4, 8]
    assert not any(Rettention().observes(step(s, None)) for s in range(-1, 50))
    assert not any(from_dict({"method": "draft"}).observes(step(s)) for s in range(50))
    assert Watching(inner=AdaSpa()).observes(step(10)) == AdaSpa().observes(step(10))
