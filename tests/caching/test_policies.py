"""Knobs that all policies share, and when Δ-DiT and adaptive policies compute a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vdit_fast.caching import (
    GRANULARITIES,
    REGISTRY,
    CachePolicy,
    DeltaDiT,
    FirstBlock,
    Stream,
    TaylorSeer,
    TeaCache,
    from_dict,
)
from vdit_fast.caching.checks import size
from vdit_fast.context import StepContext

DONE = Stream(first=0, step=4)


def at(step: int, total: int | None = 20, sigma: float | None = None) -> StepContext:
    return StepContext(step=step, num_steps=total, sigma=sigma)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_policy_round_trips_and_names_its_granularities(name: str) -> None:
    policy = REGISTRY[name]()
    assert from_dict(policy.to_dict()) == policy
    assert policy.granularity in policy.granularities
    assert set(policy.granularities) <= set(GRANULARITIES)
    for wrong in (set(GRANULARITIES) - set(policy.granularities)) | {"layer"}:
        with pytest.raises(ValueError, match=rf"granularity of {name} is '{wrong}'"):
            REGISTRY[name](granularity=wrong)


def test_noise_levels_decide_where_steps_cannot() -> None:
    policy = TaylorSeer(first_full=0, last_full=0, full_above=0.8, full_below=0.1)
    for sigma, reason in ((0.9, "at least 0.8"), (0.8, "at least 0.8"), (1 - 0.2 - 5e-7, "at least 0.8")):
        assert reason in str(policy.decide(at(5, sigma=sigma), DONE))
    assert policy.decide(at(5, sigma=0.5), DONE) is None
    assert policy.decide(at(5, total=None, sigma=0.5), DONE) is None  # no schedule is needed
    assert "at most 0.1" in str(policy.decide(at(5, sigma=0.05), DONE))
    assert "unknown" in str(policy.decide(at(5), DONE))


def test_delta_dit_leaves_out_rear_blocks_early_and_front_blocks_late() -> None:
    policy = DeltaDiT(bound=8, length=3)
    assert [policy.span(at(step), 10) for step in (0, 7, 8, 19)] == [(7, 10), (7, 10), (0, 3), (0, 3)]
    half = DeltaDiT(bound=0.25, length=0.5)
    assert [half.span(at(step), 7) for step in (4, 5)] == [(4, 7), (0, 3)]  # of 20 steps
    assert [half.span(at(9, None, sigma), 4) for sigma in (0.76, 0.75)] == [(2, 4), (0, 2)]
    assert "bound 0.25" in str(half.decide(at(5, None), DONE))
    with pytest.raises(ValueError, match="length is 3 but the transformer has 2 blocks"):
        policy.span(at(0), 2)


def test_spans_of_blocks() -> None:
    assert TaylorSeer(granularity="span").span(at(0), 7) == (0, 7)
    for blocks, want in (([1, -1], (1, 6)), ((2, None), (2, 7)), ([-3, 7], (4, 7))):
        policy = TaylorSeer(granularity="span", blocks=blocks)  # type: ignore[arg-type]
        assert policy.span(at(0), 7) == want and from_dict(policy.to_dict()) == policy
    for blocks in ([3, 3], [5, 2], [0, 8], [-9, 2]):
        with pytest.raises(ValueError, match="leaves no blocks of a transformer with 7"):
            TaylorSeer(granularity="span", blocks=blocks).span(at(0), 7)  # type: ignore[arg-type]


def test_first_block_follows_the_change() -> None:
    policy = FirstBlock(threshold=0.2)
    assert policy.span(at(3), 6) == (1, 6)
    assert policy.verdict(Stream(), 0.19) is None
    for change in (0.2, 1.0, float("nan"), float("inf")):
        assert "0.2 or more" in str(policy.verdict(Stream(), change))
    with pytest.raises(ValueError, match="at least 2 blocks"):
        policy.span(at(0), 1)


def test_teacache_adds_up_rescaled_changes() -> None:
    policy, stream = TeaCache(threshold=1.0, coefficients=[2.0, -0.5, 0.1]), Stream()  # type: ignore[arg-type]
    assert policy.rescaled(0.3) == pytest.approx(2 * 0.09 - 0.15 + 0.1)
    assert TeaCache().rescaled(0.3) == 0.3
    plain = TeaCache(threshold=1.0)
    verdicts = []
    for change in (0.4, 0.4, 0.3, 0.9, 0.2):
        verdicts.append(plain.verdict(stream, change) is None)
        plain.keep(stream, torch.ones(1), computed=not verdicts[-1])
    assert verdicts == [True, True, False, True, False]
    assert "1 or more" in str(plain.verdict(Stream(), float("nan")))
    assert from_dict(policy.to_dict()) == policy


@pytest.mark.parametrize(
    ("policy", "knobs", "message"),
    [
        (TaylorSeer, {"full_above": 1.5}, "full_above"),
        (TaylorSeer, {"full_below": "0.1"}, "full_below"),
        (TaylorSeer, {"storage": "fp8"}, "storage is 'fp8'"),
        (TaylorSeer, {"offload": 1}, "offload"),
        (TaylorSeer, {"max_bytes": "8 gigs"}, "max_bytes is '8 gigs'"),
        (TaylorSeer, {"max_bytes": -1}, "max_bytes"),
        (TaylorSeer, {"max_bytes": 1.5}, "max_bytes"),
        (TaylorSeer, {"order": 5}, "order"),
        (TaylorSeer, {"blocks": (0, 2)}, "granularity is 'model'"),
        (TaylorSeer, {"granularity": "span", "blocks": 3}, "blocks"),
        (TaylorSeer, {"granularity": "span", "blocks": (None, 3)}, "blocks"),
        (DeltaDiT, {"bound": 1.0}, "bound"),
        (DeltaDiT, {"bound": True}, "bound"),
        (DeltaDiT, {"length": 0}, "length"),
        (DeltaDiT, {"length": 1.0}, "length"),
        (TeaCache, {"coefficients": [1.0, "x"]}, "coefficients"),
        (TeaCache, {"coefficients": []}, "coefficients"),
        (TeaCache, {"coefficients": [float("inf")]}, "coefficients"),
        (FirstBlock, {"threshold": -0.1}, "threshold"),
        (FirstBlock, {"threshold": float("nan")}, "threshold"),
    ],
)
def test_bad_knobs(policy: type[CachePolicy], knobs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        policy(**knobs)


def test_sizes_in_words() -> None:
    for text, want in (("8 GB", 8 * 10**9), ("512MiB", 512 << 20), ("1.5 kb", 1500), (7, 7), ("7", 7), ("0 B", 0)):
        assert size("max_bytes", text) == want
