"""The forecast against closed forms, and when a step is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast.caching import TaylorSeer, from_dict
from vdit_fast.caching.base import Stream
from vdit_fast.context import StepContext


def paper(**knobs: Any) -> TaylorSeer:
    return TaylorSeer(**{"damping": 1.0, "first_full": 1, "last_full": 0} | knobs)


def feed(policy: TaylorSeer, steps: list[int], f: Any) -> Stream:
    stream = Stream()
    for step in steps:
        policy.update(stream, step, f(step))
    stream.first = steps[0]
    return stream


def test_order_1_is_exact_for_features_linear_in_the_step() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64).float()
    policy = paper(order=1)
    stream = feed(policy, [0, 3, 8], lambda s: a + s * b)
    for k in (1, 2, 5, 9):
        torch.testing.assert_close(policy.forecast(stream, 8 + k), a + (8 + k) * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_quadratic_features(distance: int, k: int) -> None:
    c = torch.randn(5)
    t = 4 * distance
    steps = list(range(0, t + 1, distance))
    true = c * (t + k) ** 2

    first = paper(order=1)
    error = first.forecast(feed(first, steps, lambda s: c * s**2), t + k) - true
    torch.testing.assert_close(error, -c * k * (k + distance), rtol=1e-4, atol=1e-3)

    second = paper(order=2)  # every order divides by the latest distance, so this is not exact either
    guess = second.forecast(feed(second, steps, lambda s: c * s**2), t + k)
    torch.testing.assert_close(guess, true - c * distance * k, rtol=1e-4, atol=1e-3)


def test_one_computed_step_is_repeated() -> None:
    x = torch.randn(7)
    for order in (0, 1, 3):
        policy = paper(order=order)
        assert torch.equal(policy.forecast(feed(policy, [5], lambda _: x), 9), x)


def test_order_0_repeats_the_last_output_and_keeps_one_tensor() -> None:
    policy = paper(order=0)
    xs = torch.randn(4, 6)
    stream = feed(policy, [0, 1, 2, 3], lambda s: xs[s])
    assert torch.equal(policy.forecast(stream, 5), xs[3]) and len(stream.factors) == 1


def test_damping_shortens_the_distance() -> None:
    a, b = torch.randn(2, 6)
    half, full = paper(damping=0.5), paper()
    stream = feed(full, [0, 2], lambda s: a + s * b)
    torch.testing.assert_close(half.forecast(stream, 4), full.forecast(stream, 3))
    assert torch.equal(paper(damping=0.0).forecast(stream, 4), stream.factors[0])


def test_factors_are_fp32_and_own_their_memory() -> None:
    policy, x = paper(), torch.randn(4)
    stream = feed(policy, [0, 1], lambda _: x)
    result = policy.forecast(stream, 2)
    kept = result.clone()
    result.zero_()
    assert not torch.equal(policy.forecast(stream, 2), result)
    x.zero_()  # what the caller does with an output must not reach the history
    assert torch.equal(policy.forecast(stream, 2), kept)
    half = feed(policy, [0], lambda _: x.bfloat16())
    assert half.factors[0].dtype == torch.float32


def computed(policy: TaylorSeer, total: int | None, steps: int) -> list[int]:
    stream, found = Stream(), []
    for step in range(steps):
        if policy.decide(StepContext(step=step, num_steps=total), stream) is not None:
            found.append(step)
            policy.update(stream, step, torch.ones(1))
            stream.first = found[0]
    return found


def test_schedules() -> None:
    assert computed(paper(interval=5), 50, 50) == list(range(0, 50, 5))  # Wan, HunyuanVideo in the paper's code
    assert computed(paper(interval=6, first_full=3), 50, 50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]  # FLUX
    assert computed(paper(interval=1), 10, 10) == list(range(10))
    assert computed(paper(interval=2, first_full=0.34, last_full=1), 12, 12) == [0, 1, 2, 3, 5, 7, 9, 11]
    assert computed(paper(interval=4, first_full=2, last_full=3), 12, 12) == [0, 1, 5, 9, 10, 11]
    assert computed(paper(interval=4, first_full=2, last_full=3), None, 12) == [0, 1, 5, 9]  # no scheduler, no end
    assert computed(paper(first_full=0.3), None, 3) == [0, 1, 2]


def test_reasons() -> None:
    policy = paper(first_full=2, last_full=1)
    here = StepContext(step=3, num_steps=9)
    full = feed(policy, [1, 2], lambda _: torch.ones(1))
    assert policy.decide(here, full) is None
    for step, stream, reason in (
        (replace(here, step=-1), full, "unknown"),
        (here, feed(policy, [2], lambda _: torch.ones(1)), "first 2"),  # of those that this transformer sees
        (replace(here, step=8), full, "last 1"),
        (replace(here, step=4), full, "interval 2"),
        (here, feed(policy, [1, 3], lambda _: torch.ones(1)), "not later"),
    ):
        found = policy.decide(step, stream)
        assert found is not None and reason in found
    found = paper(first_full=0).decide(here, Stream())
    assert found is not None and "nothing" in found


def test_mapping_form() -> None:
    policy = TaylorSeer(order=2, interval=3, first_full=4)
    assert from_dict(policy.to_dict()) == policy
    with pytest.raises(ValueError, match=r"no knob 'intervall'.*'interval'"):
        from_dict({"method": "taylorseer", "intervall": 3})
    with pytest.raises(ValueError, match=r"unknown cache policy method 'taylor'.*'taylorseer'"):
        from_dict({"method": "taylor"})


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"order": -1}, "order"),
        ({"order": 1.0}, "order"),
        ({"damping": 1.5}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping": True}, "damping"),
        ({"interval": 0}, "interval"),
        ({"first_full": 1.0}, "first_full"),
        ({"first_full": -1}, "first_full"),
        ({"last_full": "1"}, "last_full"),
    ],
)
def test_bad_knobs(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TaylorSeer(**knobs)


def test_forecast_does_not_depend_on_history_beyond_its_order() -> None:
    policy = paper(order=1)
    xs: Tensor = torch.randn(6, 5)
    long = feed(policy, [0, 1, 2, 3], lambda s: xs[s])
    short = feed(policy, [2, 3], lambda s: xs[s])
    torch.testing.assert_close(policy.forecast(long, 5), policy.forecast(short, 5))
