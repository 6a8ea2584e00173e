"""Steps that the caller names: what hooks, planners and caches are told, and how such runs begin and end."""

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
from vdit_fast.context import StepContext
from vdit_fast.handle import Handle


def watched(config: Config | None = None) -> tuple[nn.Module, dict[str, Any], Handle, list[StepContext]]:
    model, inputs = tiny.wan(layers=1)
    handle = accelerate(model, config or Config())
    seen: list[StepContext] = []
    handle.hook("attention_output", lambda step, place, rows: seen.append(step))
    return model, inputs, handle, seen


def test_what_is_named_is_what_everybody_is_told() -> None:
    model, inputs, handle, seen = watched()
    with handle.step(30, timestep=700.0, num_steps=50):
        tiny.run(model, inputs)
        tiny.run(model, inputs)
    with handle.step(7, sigma=0.25, branch=3, model="weak"):
        tiny.run(model, inputs)
        tiny.run(model, inputs)
    with handle.step(None):
        tiny.run(model, inputs)
    told = [(s.step, s.num_steps, s.timestep, s.sigma, s.branch, s.expert) for s in seen]
    assert told == [
        (30, 50, 700.0, 0.7, 0, "transformer"),
        (30, 50, 700.0, 0.7, 1, "transformer"),
        (7, None, None, 0.25, 3, "weak"),
        (7, None, None, 0.25, 3, "weak"),
        (-1, None, None, None, 0, "transformer"),
    ]
    assert {s.generation for s in seen} == {0} and handle.host_reads == 0


def test_named_steps_go_anywhere_without_a_new_generation() -> None:
    model, inputs, handle, seen = watched(Config(attention=tiny.Band()))
    for step in (5, 2, 2, 9, 0):
        with handle.step(step, timestep=1000.0 - 100 * step):
            tiny.run(model, inputs)
    assert [(s.step, s.branch, s.generation) for s in seen] == [(n, 0, 0) for n in (5, 2, 2, 9, 0)]
    assert len(handle.roots[0].session.state["seen"]) == 5  # nothing was thrown away in between
    handle.reset()
    with handle.step(0):
        tiny.run(model, inputs)
    assert seen[-1].generation == 1 and len(handle.roots[0].session.state["seen"]) == 1


def test_named_and_derived_steps_are_different_runs() -> None:
    model, inputs, handle, seen = watched()
    for value in (900.0, 800.0):
        tiny.run(model, tiny.at(inputs, value))
    for step in (4, 3):
        with handle.step(step):
            tiny.run(model, inputs)
    for value in (700.0, 600.0):
        tiny.run(model, tiny.at(inputs, value))
    assert [(s.generation, s.step) for s in seen] == [(0, 0), (0, 1), (1, 4), (1, 3), (2, 0), (2, 1)]


def test_a_copied_model_derives_its_steps() -> None:
    model, inputs, handle, _ = watched()
    with handle.step(4):
        twin = copy.deepcopy(model)
        tiny.run(twin, inputs)
        assert accelerate(twin).roots[0].session.forward.step.step == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"step_id": -1}, ValueError, "step_id"),
        ({"step_id": 1.0}, TypeError, "step_id"),
        ({"step_id": True}, TypeError, "step_id"),
        ({"step_id": 50, "num_steps": 50}, ValueError, "below num_steps"),
        ({"step_id": 1, "num_steps": 0}, ValueError, "num_steps"),
        ({"step_id": 1, "sigma": 1.5}, ValueError, "sigma"),
        ({"step_id": 1, "sigma": float("nan")}, ValueError, "finite"),
        ({"step_id": 1, "timestep": torch.tensor(3.0)}, TypeError, "item"),
        ({"step_id": 1, "branch": -1}, ValueError, "branch"),
        ({"step_id": 1, "model": 3}, TypeError, "model"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, match: str) -> None:
    _, _, handle, _ = watched()
    with pytest.raises(error, match=match):
        handle.step(**arguments)


def test_one_step_at_a_time_and_an_error_ends_it() -> None:
    model, inputs, handle, seen = watched()
    with pytest.raises(RuntimeError, match="another step"), handle.step(3), handle.step(4):
        pass
    tiny.run(model, tiny.at(inputs, 900.0))
    assert seen[-1].timestep == 900.0
    again = handle.step(3)
    for _ in range(2):
        with again:
            tiny.run(model, inputs)
        assert (seen[-1].step, seen[-1].branch) == (3, 0)


@pytest.mark.slow
def test_inside_a_compiled_transformer() -> None:
    model, inputs = tiny.wan(layers=1)
    handle = accelerate(model, Config(attention=tiny.Band()))
    model.compile(backend="aot_eager")
    with torch.no_grad():
        for step in (5, 2):
            with handle.step(step, model="weak"):
                model(**inputs)
    assert [(s, e) for _, s, _, e in handle.roots[0].session.state["seen"]] == [(5, "weak"), (2, "weak")]


def sampled(
    run: Callable[[Tensor, int], Tensor], sigmas: Tensor, x: Tensor, begin: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Euler steps of a flow: latents before every step and after the last, and velocities."""
    trail, velocities = [x], []
    for step in range(begin, len(sigmas) - 1):
        velocities.append(run(trail[-1], step))
        trail.append(trail[-1] + (sigmas[step + 1] - sigmas[step]) * velocities[-1])
    return trail, velocities


@pytest.mark.parametrize("knob", [3, 0.5])
@pytest.mark.parametrize("known", ["steps", "sigma"])
def test_rules_hold_in_a_part_of_the_schedule(knob: float, known: str) -> None:
    """dense_steps means the schedule's steps, or its noise levels, wherever a run begins."""
    sigmas = torch.linspace(1, 0, 7, dtype=torch.float64).float()
    model, inputs = tiny.wan(layers=1)
    handle = accelerate(model, Config(attention=tiny.Band(width=2, dense_steps=knob)))

    def run(x: Tensor, step: int) -> Tensor:
        sigma = float(sigmas[step])
        arguments: dict[str, Any] = {"num_steps": 6} if known == "steps" else {}
        with handle.step(step, sigma=sigma, **arguments):
            return tiny.run(model, {**tiny.at(inputs, 1000 * sigma), "hidden_states": x})

    x = inputs["hidden_states"]
    whole, _ = sampled(run, sigmas, x)
    (layer,) = handle.stats()["layers"]
    assert [density is not None and density < 1 for density in layer["density"]] == [False] * 3 + [True] * 3
    handle.reset()
    tail, _ = sampled(run, sigmas, whole[2], begin=2)
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[2:], strict=True))


def test_a_cache_counts_its_first_steps_from_where_the_run_begins() -> None:
    model, inputs, handle, _ = watched(Config(cache=TaylorSeer(first_full=2, last_full=1, interval=3)))
    for step in range(4, 10):
        with handle.step(step, num_steps=10):
            tiny.run(model, inputs)
    cache = handle.stats()["cache"]
    assert cache["forecast"] == {6: 1, 7: 1} and sum(cache["full"].values()) == 4


def test_what_one_model_remembers_never_serves_another() -> None:
    """The same transformer under two names, by turns: each forecast repeats its own last output."""
    model, inputs, handle, _ = watched(Config(cache=TaylorSeer(first_full=1, last_full=0, interval=2, order=0)))
    outputs: dict[tuple[str, int], Tensor] = {}
    for step in range(2):
        for name, scale in (("strong", 1.0), ("weak", 0.5)):
            with handle.step(step, model=name, num_steps=20):
                x = {**inputs, "hidden_states": scale * inputs["hidden_states"]}
                outputs[name, step] = tiny.run(model, x)
    for name in ("strong", "weak"):
        assert torch.equal(outputs[name, 0], outputs[name, 1])
    assert not torch.equal(outputs["strong", 0], outputs["weak", 0])


def test_guidance_branches_follow_the_verdict_of_their_own_model() -> None:
    """An adaptive cache: the weak model's input changes and is computed, the strong one's branches are forecast."""
    model, inputs = tiny.wan(layers=2)
    handle = accelerate(model, Config(cache=FirstBlock(threshold=0.05, first_full=1, last_full=0)))
    for step in range(2):
        for name, branch, scale in (("strong", 0, 1.0), ("weak", 0, 1.0 + step), ("strong", 1, 1.0)):
            with handle.step(step, timestep=500.0, branch=branch, model=name, num_steps=20):
                tiny.run(model, {**inputs, "hidden_states": scale * inputs["hidden_states"]})
    assert handle.stats()["cache"]["forecast"] == {1: 2}


def test_a_repeated_step_is_computed_and_begins_its_history_anew() -> None:
    model, inputs, handle, _ = watched(Config(cache=TaylorSeer(first_full=1, last_full=0, interval=3)))
    for step in (3, 4, 3, 3, 4):
        with handle.step(step, num_steps=20):
            tiny.run(model, inputs)
    cache = handle.stats()["cache"]
    assert cache["forecast"] == {4: 2} and sum(cache["full"].values()) == 3


@pytest.mark.parametrize(("steps", "forecast"), [(4, 0), (8, 0), (9, 3)])
def test_short_schedules_are_computed_as_a_whole(steps: int, forecast: int) -> None:
    policy = TaylorSeer(first_full=0.3, last_full=1, interval=2, min_steps=9)
    model, inputs, handle, _ = watched(Config(cache=policy))
    for step in range(steps):
        with handle.step(step, num_steps=steps):
            tiny.run(model, inputs)
    cache = handle.stats()["cache"]
    assert sum(cache["forecast"].values()) == forecast
    assert forecast or cache["full"] == {f"a schedule of {steps} steps, fewer than min_steps 9": steps}
    with pytest.raises(ValueError, match="min_steps"):
        TaylorSeer(min_steps=-1)
