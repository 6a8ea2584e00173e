"""The forecast against closed forms, and when a step is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast.caching import Stream, TaylorSeer, from_dict
from vdit_fast.caching.stream import Factors
from vdit_fast.context import StepContext

CPU = torch.device("cpu")


def paper(**knobs: Any) -> TaylorSeer:
    return TaylorSeer(**{"damping": 1.0, "first_full": 1, "last_full": 0} | knobs)


def feed(policy: TaylorSeer, steps: list[int], f: Any) -> Factors:
    factors = Factors(f(steps[0]).shape, policy.degree, torch.float32, CPU)
    for step in steps:
        factors.update(step, f(step))
    return factors


def guess(policy: TaylorSeer, factors: Factors, step: int) -> Tensor:
    return factors.forecast(policy.weights(step - factors.step, factors.known), torch.float32)


def test_order_1_is_exact_for_features_linear_in_the_step() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64).float()
    policy = paper(order=1)
    factors = feed(policy, [0, 3, 8], lambda s: a + s * b)
    for k in (1, 2, 5, 9):
        torch.testing.assert_close(guess(policy, factors, 8 + k), a + (8 + k) * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_quadratic_features(distance: int, k: int) -> None:
    c = torch.randn(5)
    t = 4 * distance
    steps = list(range(0, t + 1, distance))
    true = c * (t + k) ** 2

    first = paper(order=1)
    error = guess(first, feed(first, steps, lambda s: c * s**2), t + k) - true
    torch.testing.assert_close(error, -c * k * (k + distance), rtol=1e-4, atol=1e-3)

    second = paper(order=2)  # every order divides by the latest distance, so this is not exact either
    found = guess(second, feed(second, steps, lambda s: c * s**2), t + k)
    torch.testing.assert_close(found, true - c * distance * k, rtol=1e-4, atol=1e-3)


def test_one_computed_step_is_repeated() -> None:
    x = torch.randn(7)
    for order in (0, 1, 3):
        policy = paper(order=order)
        assert torch.equal(guess(policy, feed(policy, [5], lambda _: x), 9), x)


def test_order_0_repeats_the_last_output_and_keeps_one_tensor() -> None:
    policy = paper(order=0)
    xs = torch.randn(4, 6)
    factors = feed(policy, [0, 1, 2, 3], lambda s: xs[s])
    assert torch.equal(guess(policy, factors, 5), xs[3]) and factors.nbytes == xs[3].numel() * 4


def test_damping_shortens_the_distance() -> None:
    a, b = torch.randn(2, 6)
    half, full = paper(damping=0.5), paper()
    factors = feed(full, [0, 2], lambda s: a + s * b)
    torch.testing.assert_close(guess(half, factors, 4), guess(full, factors, 3))
    assert torch.equal(guess(paper(damping=0.0), factors, 4), a + 2 * b)


def test_factors_own_their_memory() -> None:
    policy, x = paper(), torch.randn(4)
    factors = feed(policy, [0, 1], lambda _: x)
    result = guess(policy, factors, 2)
    kept = result.clone()
    result.zero_()
    assert not torch.equal(guess(policy, factors, 2), result)
    x.zero_()  # what the caller does with an output must not reach the history
    assert torch.equal(guess(policy, factors, 2), kept)


def computed(policy: TaylorSeer, total: int | None, steps: int) -> list[int]:
    stream, found = Stream(), []
    for step in range(steps):
        if policy.decide(StepContext(step=step, num_steps=total), stream) is not None:
            found.append(step)
            stream.begin(step)
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
    full = Stream(first=1, step=2)
    assert policy.decide(here, full) is None
    for step, stream, reason in (
        (replace(here, step=-1), full, "unknown"),
        (here, Stream(first=2, step=2), "first 2"),  # of those that this transformer sees
        (replace(here, step=8), full, "last 1"),
        (replace(here, step=4), full, "interval 2"),
        (here, Stream(first=1, step=3), "not later"),
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
    torch.testing.assert_close(guess(policy, long, 5), guess(policy, short, 5))
