"""Factors in float8_e4m3fn: bytes to the last one, refusals that name what fits, and forecasts near the wide ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny
import torch
from test_cache_blocks import generate, policy

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import CachePolicy, DeltaDiT, FirstBlock, TaylorSeer, TeaCache, budget
from vdit_fast.caching.stream import Factors
from vdit_fast.config import Config

E4M3 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def factor_bytes(handle: Any) -> int:
    """Elements and rows of all features of one factor, a byte and four bytes each, from their shapes."""
    streams = [stream for _, stream in handle.roots[0].session.cache._streams.values()]
    held = [factors.here()[0] for stream in streams for factors in stream.factors.values()]
    return sum(t[0].numel() + t[0].numel() // t.shape[-1] * 4 for t in held)


@pytest.mark.parametrize("build", [tiny.wan, tiny.hunyuan, tiny.cogvideox])
@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
def test_the_estimate_is_what_is_allocated(build: Any, granularity: str) -> None:
    model, inputs = build()
    for order in (0, 1, 4):
        knobs: dict[str, Any] = {"storage": "float8_e4m3fn", "order": order}
        with accelerate(model, Config(cache=policy(granularity, **knobs))) as handle:
            generate(model, inputs, branches=2)
            held = handle.stats()["cache"]["nbytes"]
            assert held == (order + 1) * factor_bytes(handle) > 0
        with accelerate(model, Config(cache=policy(granularity, **knobs, max_bytes=held))):
            generate(model, inputs, branches=2)
        with accelerate(model, Config(cache=policy(granularity, **knobs, max_bytes=held - 1))) as handle:
            with pytest.raises(ValueError, match=rf"needs {held:,} bytes.* · 1 bytes and [\d,]+ scales of 4, but"):
                generate(model, inputs, branches=2)
            assert handle.stats()["cache"]["nbytes"] == held // 2  # the second branch is refused as a whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
def test_forecasts_are_near_those_of_wide_factors(granularity: str, dtype: torch.dtype) -> None:
    model, inputs = tiny.wan(layers=3)
    model.to(dtype)
    inputs = tiny.cast(inputs, dtype)
    found, held = {}, {}
    for storage in ("fp32", "auto", "float8_e4m3fn"):
        with accelerate(model, Config(cache=policy(granularity, storage=storage))) as handle:
            found[storage] = generate(model, inputs)
            held[storage] = handle.stats()["cache"]["nbytes"]
            assert handle.stats()["cache"]["forecast"] == {2: 1, 4: 1}
    assert held["float8_e4m3fn"] < held["fp32"] / 2
    for step, (narrow, wide) in enumerate(zip(found["float8_e4m3fn"], found["fp32"], strict=True)):
        assert narrow.dtype == wide.dtype
        if step in (2, 4):
            assert 0 < tiny.relative(narrow, wide) < 0.1
        else:
            assert torch.equal(narrow, wide)


@pytest.mark.parametrize(
    "chosen",
    [
        DeltaDiT(first_full=1, last_full=0, bound=3, storage="float8_e4m3fn"),
        FirstBlock(threshold=1e9, first_full=1, last_full=0, storage="float8_e4m3fn"),
        TeaCache(threshold=1e9, first_full=1, last_full=0, storage="float8_e4m3fn"),
        TaylorSeer(granularity="span", blocks=(1, -1), order=2, first_full=2, last_full=0, storage="float8_e4m3fn"),
    ],
    ids=lambda p: p.name,
)
def test_every_policy(chosen: CachePolicy) -> None:
    model, inputs = tiny.wan(layers=4)
    found = {}
    for storage in ("auto", "float8_e4m3fn"):
        settings = chosen.to_dict() | {"storage": storage}
        with accelerate(model, Config.from_dict({"cache": settings})) as handle:
            found[storage] = generate(model, inputs), handle.stats()["cache"]
    (wide, stats), (narrow, own) = found.values()
    assert stats["forecast"] == own["forecast"] and sum(own["forecast"].values()) > 0
    assert own["nbytes"] < stats["nbytes"]
    assert all(tiny.relative(a, b) < 0.1 for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("storage", ["auto", "float8_e4m3fn"])
@pytest.mark.parametrize("chosen", [FirstBlock, TeaCache])
def test_what_a_refusal_of_two_branches_says_is_enough(chosen: type[CachePolicy], storage: str) -> None:
    """What an adaptive policy compares with is kept beside the factors and not counted."""
    model, inputs = tiny.wan()
    knobs = {"threshold": 1e9, "first_full": 1, "last_full": 0, "storage": storage}
    limits = [1]
    while len(limits) < 5:
        try:
            with accelerate(model, Config(cache=chosen(**knobs, max_bytes=limits[-1]))):
                generate(model, inputs, branches=2)
            break
        except ValueError as error:
            needs = re.search(r"needs ([\d,]+) bytes", str(error))
            assert needs is not None
            limits.append(int(needs[1].replace(",", "")))
    assert 2 <= len(limits) <= 3 and limits == sorted(set(limits))  # a second branch counts when it comes


def test_a_refusal_names_storages_that_fit() -> None:
    chosen = TaylorSeer(granularity="block", order=1, max_bytes=10_000)
    sizes = {"span": budget.Size(3200, 100), "block": budget.Size(6400, 200)}
    with pytest.raises(
        ValueError, match=r"granularity 'span' with storage 'float8_e4m3fn' \(7,200\) would fit; 'model'"
    ):
        budget.check(chosen, sizes, torch.float32)
    whole = {**sizes, "model": budget.Size(800, 200), "module": budget.Size(9600, 300)}
    for known, limit, message in (
        (
            sizes,
            7199,
            r"the least is 'span' with storage 'float8_e4m3fn', which max_bytes of 7,200 would hold; 'model'",
        ),
        (whole, 7199, r"granularity 'model' \(6,400\) would fit$"),
        (whole, 6399, r"granularity 'model' with storage 'bf16' \(3,200\) would fit$"),  # 4 numbers to a scale
        (whole, 3199, r"no granularity .* fits: the least is 'model' with storage 'bf16', which max_bytes of 3,200 "),
    ):
        with pytest.raises(ValueError, match=message):
            budget.check(TaylorSeer(granularity="block", order=1, max_bytes=limit), known, torch.float32)
    with pytest.raises(
        ValueError, match=r"the least is 'span' with storage 'auto', which max_bytes of 6,400 would hold$"
    ):
        narrow = {"span": budget.Size(3200, 1600), "block": budget.Size(6400, 3200)}
        budget.check(FirstBlock(max_bytes=6399), narrow | {"model": budget.Size(1, 1)}, torch.float16)
    for limit, message in (
        (14_400, r"storage 'float8_e4m3fn' \(14,400\) would fit"),
        (
            25_600,
            r"'span' \(25,600\) would fit; storage 'bf16' \(25,600\) or 'float8_e4m3fn' \(14,400\) would fit; 'model'",
        ),
    ):
        with pytest.raises(ValueError, match=rf"needs 51,200 bytes.*{message}"):
            budget.check(TaylorSeer(granularity="block", order=1, max_bytes=limit), sizes, torch.float32)
    with pytest.raises(ValueError, match=r"needs 14,400 bytes.*6,400 elements · 1 bytes and 200 scales of 4, but"):
        budget.check(TaylorSeer(granularity="block", storage="float8_e4m3fn", max_bytes=14_399), sizes, torch.bfloat16)
    with pytest.raises(ValueError, match=r"storage 'fp16' \(25,600\) or 'float8_e4m3fn'"):
        budget.check(TaylorSeer(granularity="block", storage="fp32", max_bytes=30_000), sizes, torch.float16)


@pytest.mark.parametrize(("width", "message"), [(1, "no less than 16-bit"), (4, "no less"), (16385, "at most 16,384")])
def test_rows_that_a_scale_does_not_suit(width: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"a feature \[2, {width}\] has rows of {width:,} numbers.*{message}.*'auto'"):
        budget.check_rows((2, width), E4M3)
    budget.check_rows((2, width), torch.bfloat16)


def test_latents_of_short_rows_are_refused() -> None:
    model, inputs = tiny.wan()
    narrow = {**inputs, "hidden_states": inputs["hidden_states"][..., :4]}
    with accelerate(model, Config(cache=policy("model", storage="float8_e4m3fn"))) as handle:
        with pytest.raises(ValueError, match=r"has rows of 4 numbers in its last dimension.*set storage to 'auto'"):
            tiny.run(model, narrow)
        assert handle.stats()["cache"]["nbytes"] == 0
    for width in (5, 16384):
        budget.check_rows((3, width), E4M3)


def test_factors_hold_codes_and_scales() -> None:
    for order in range(5):
        factors = Factors((2, 5, 24), order, E4M3, CPU)
        kept, scales = factors.here()
        assert kept.shape == (order + 1, 2, 5, 24) and scales is not None and scales.shape == (order + 1, 2, 5)
        assert factors.nbytes == (order + 1) * (240 + 40)
        for known in range(order + 2):
            x = torch.randn(2, 5, 24)
            factors.update(known, x)
            assert factors.known == min(known, order) + 1
            got = factors.forecast([1.0], torch.float32)
            assert ((got - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 2**17).all()
            assert torch.equal(factors.added_to(x, [1.0]), x + got)


def test_offloaded_factors_forecast_the_same() -> None:
    xs = torch.randn(4, 5, 24)
    here, away = (Factors((5, 24), 2, E4M3, CPU, offload) for offload in (False, True))
    away._away = True  # as where the features are on another device
    for step, x in enumerate(xs):
        here.update(step, x)
        away.update(step, x)
    for weights in ([1.0], [1.0, 0.5], [1.0, 0.5, 0.1]):
        assert torch.equal(here.forecast(weights, torch.float32), away.forecast(weights, torch.float32))


@pytest.mark.gpu
def test_offloaded_factors_of_a_gpu_lie_in_pinned_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    here, away = (Factors((64, 96), 2, E4M3, device, offload) for offload in (False, True))
    before = torch.cuda.memory_allocated()
    for step in range(4):
        x = torch.randn(64, 96, device=device)
        here.update(step, x)
        away.update(step, x)
        found = [factors.added_to(x, [1.0, 0.5, 0.1][: factors.known]) for factors in (here, away)]
        assert torch.equal(*found)
    del found, x
    assert all(part.is_pinned() for part in away._kept) and torch.cuda.memory_allocated() <= before
    assert away.nbytes == here.nbytes
