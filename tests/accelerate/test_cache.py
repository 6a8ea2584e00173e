"""Cache policies on tiny models of the real classes: what is computed, what comes out, and the way back."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.caching.engine import FeatureCache
from vdit_fast.caching.output import run_cached
from vdit_fast.config import Config
from vdit_fast.context import StepContext

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
POLICY = TaylorSeer(first_full=2, last_full=0, interval=2, damping=1.0)


def generate(model: nn.Module, inputs: dict[str, Any], branches: int = 1) -> list[Tensor]:
    return [
        tiny.run(model, tiny.at({**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * (1 + b)}, t))
        for t in TIMES
        for b in range(branches)
    ]


def expected(stock: list[Tensor], branches: int = 1) -> list[Tensor]:
    """Steps 0, 1, 3 are computed; 2 and 4 are linear in the step through the last two of their branch."""
    rows = [[x.double() for x in stock[b::branches]] for b in range(branches)]
    for row in rows:
        row[2] = 2 * row[1] - row[0]
        row[4] = row[3] + (row[3] - row[1]) / 2
    return [row[step] for step in range(len(TIMES)) for row in rows]


def test_forecast_outputs(family: str) -> None:
    model, inputs = tiny.build(family)
    with torch.no_grad():
        outputs = model(**inputs)
    stock = generate(model, inputs, branches=2)
    with accelerate(model, Config(cache=POLICY)) as handle:
        for _ in range(2):  # a second generation starts from nothing and gives the same
            handle.reset()
            got = generate(model, inputs, branches=2)
            for mine, want in zip(got, expected(stock, branches=2), strict=True):
                assert tiny.relative(mine, want) < 1e-5
        stats = handle.stats()["cache"]
        assert stats["forecast"] == {2: 4, 4: 4} and sum(stats["full"].values()) == 12
        assert stats["nbytes"] == 2 * 2 * sum(output.numel() for output in outputs) * 4
        assert handle.stats()["layers"][0]["calls"] == 12
        assert "8 of 20 forwards forecast" in handle.report()
        json.dumps(handle.stats())
    again = generate(model, inputs, branches=2)
    assert all(torch.equal(a, b) for a, b in zip(again, stock, strict=True))
    assert "forward" not in model.__dict__


def test_interval_1_computes_everything() -> None:
    model, inputs = tiny.wan()
    accelerate(model, "exact")
    plain = generate(model, inputs)
    accelerate(model).remove()
    accelerate(model, Config(cache=TaylorSeer(interval=1, first_full=0)))
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs), plain, strict=True))


def test_output_classes_survive() -> None:
    model, inputs = tiny.wan()
    accelerate(model, Config(cache=POLICY))
    inputs = {**inputs, "return_dict": True}
    with torch.no_grad():
        found = [model(**tiny.at(inputs, t)) for t in TIMES]
    assert {type(out).__name__ for out in found} == {"Transformer2DModelOutput"}
    assert all(out.sample.shape == found[0].sample.shape and out[0] is out.sample for out in found)
    model.to(torch.bfloat16)
    with torch.no_grad():
        kinds = {model(**tiny.at(tiny.cast(inputs, torch.bfloat16), t)).sample.dtype for t in TIMES}
    assert kinds == {torch.bfloat16}


def test_positional_arguments() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    accelerate(model, Config(cache=POLICY))
    with torch.no_grad():
        got = [
            model(inputs["hidden_states"], torch.full((1,), t), inputs["encoder_hidden_states"], return_dict=False)[0]
            for t in TIMES
        ]
    for mine, want in zip(got, expected(stock), strict=True):
        assert tiny.relative(mine, want) < 1e-5


def test_another_size_or_another_step_order_is_computed() -> None:
    model, inputs = tiny.wan()
    other = tiny.wan(size=12)[1]
    handle = accelerate(model, Config(cache=POLICY))
    for t in TIMES[:2]:
        tiny.run(model, tiny.at(inputs, t))
    assert tiny.run(model, tiny.at(other, TIMES[2])).shape == other["hidden_states"].shape  # not the forecast
    assert handle.stats()["cache"]["forecast"] == {}
    tiny.run(model, tiny.at(inputs, 950.0))  # higher noise: a new generation
    assert handle.stats()["cache"]["forecast"] == {} and handle.stats()["generations"] == 2


def test_training_is_computed_and_differentiable() -> None:
    model, inputs = tiny.wan()
    model.requires_grad_(True)
    handle = accelerate(model, Config(cache=POLICY))
    for t in TIMES:
        model(**tiny.at(inputs, t))[0].square().mean().backward()
    stats = handle.stats()["cache"]
    assert stats["full"] == {"gradients are recorded": 5} and stats["forecast"] == {} and stats["nbytes"] == 0
    assert all(p.grad is not None for p in model.blocks[0].attn1.parameters())


def test_unknown_step_is_computed() -> None:
    cache, calls = FeatureCache(POLICY), []

    def stock() -> tuple[Tensor]:
        calls.append(1)
        return (torch.ones(2),)

    for _ in range(3):
        with torch.no_grad():
            run_cached(cache, StepContext(), stock, {})
    assert len(calls) == 3 and cache.nbytes == 0


def test_what_is_no_tensor_is_refused() -> None:
    for output in ((torch.ones(2), "text"), (), [torch.ones(2)], (torch.ones(2), torch.ones(2, device="meta"))):
        with torch.no_grad(), pytest.raises(RuntimeError, match="returns tensors of one device"):
            run_cached(FeatureCache(POLICY), StepContext(step=0), lambda output=output: output, {})


@pytest.mark.parametrize("kind", ["tuple", "output class"])
def test_all_of_several_outputs_are_forecast(kind: str) -> None:
    from diffusers.utils import BaseOutput

    @dataclass
    class Both(BaseOutput):
        sample: Tensor
        audio: Tensor

    cache = FeatureCache(POLICY)
    computed = [(torch.randn(2, 3, 4), torch.randn(2, 5).to(torch.bfloat16)) for _ in range(2)]
    wrap = tuple if kind == "tuple" else lambda pair: Both(*pair)
    with torch.no_grad():
        for step, pair in enumerate(computed):
            run_cached(cache, StepContext(step=step), lambda pair=pair: wrap(pair), {})
        got = run_cached(cache, StepContext(step=2), lambda: pytest.fail("it should be forecast"), {})
    assert type(got) is type(wrap(computed[0])) and len(got) == 2
    for at, (first, second) in enumerate(zip(*computed, strict=True)):
        assert got[at].shape == first.shape and got[at].dtype == first.dtype
        eps = torch.finfo(first.dtype).eps
        assert tiny.relative(got[at], 2 * second.double() - first.double()) < 2 * eps


def test_copies_and_pickles() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    handle = accelerate(model, Config(cache=POLICY))
    got = generate(model, inputs)
    twin = copy.deepcopy(model)
    own = accelerate(twin, Config(cache=POLICY))
    assert own is not handle
    assert all(torch.equal(a, b) for a, b in zip(generate(twin, inputs), got, strict=True))
    assert own.stats()["cache"]["forecast"] == {2: 1, 4: 1}
    plain = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(a, b) for a, b in zip(generate(plain, inputs), stock, strict=True))
    own.remove()
    assert all(torch.equal(a, b) for a, b in zip(generate(twin, inputs), stock, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs), got, strict=True))  # still accelerated


def test_other_wrappers_of_forward_stay_alive() -> None:
    model, inputs = tiny.wan()
    log: list[str] = []

    def wrap(name: str) -> None:
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return inner(*args, **kwargs)

        model.forward = forward

    wrap("before")
    before = model.forward
    handle = accelerate(model, Config(cache=POLICY))
    generate(model, inputs)
    assert log == ["before"] * 3  # a forecast step never moves a weight
    handle.remove()
    assert model.forward is before
    handle = accelerate(model, Config(cache=POLICY))
    wrap("after")
    log.clear()
    generate(model, inputs)
    assert log.count("after") == 5 and log.count("before") == 3
    handle.remove()
    log.clear()
    generate(model, inputs)
    assert log.count("after") == 5 and log.count("before") == 5


def test_a_wrapper_that_goes_takes_the_cache_along_for_two_steps() -> None:
    model, inputs = tiny.wan()
    own = type(model).forward

    def offload() -> None:  # what CPU offloading does before every run, and takes back after it
        model.forward = lambda *args, **kwargs: own(model, *args, **kwargs)

    offload()
    handle = accelerate(model, Config(cache=POLICY))
    generate(model, inputs)
    assert handle.stats()["cache"]["forecast"] == {2: 1, 4: 1}
    for count in (2, 3):
        offload()
        generate(model, inputs)
        # step 0 ran without the wrapper, step 1 noticed; steps 2 and 3 are the first that the cache sees
        assert handle.stats()["cache"]["forecast"] == {2: 1, 4: count}


def test_reconfigure_under_another_wrapper_forecasts_the_same() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    handle = accelerate(model, Config(cache=POLICY))
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    for _ in range(2):
        handle.reconfigure(Config(cache=POLICY))
        for mine, want in zip(generate(model, inputs), expected(stock), strict=True):
            assert tiny.relative(mine, want) < 1e-5
    assert sum(handle.stats()["cache"]["full"].values()) == 3


def test_outputs_may_be_written_to() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    accelerate(model, Config(cache=POLICY))
    for t, want in zip(TIMES, expected(stock), strict=True):
        out = tiny.run(model, tiny.at(inputs, t))
        assert tiny.relative(out, want) < 1e-5
        out.mul_(3.0)


def test_a_direct_call_of_forward_is_computed() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    accelerate(model, Config(cache=POLICY))
    for t in TIMES[:3]:  # the last one is a forecast
        tiny.run(model, tiny.at(inputs, t))
    with torch.no_grad():
        direct = model.forward(**tiny.at(inputs, TIMES[4]))[0]
    assert tiny.relative(direct, stock[4]) < 1e-5


def test_a_wrapper_without_names_gets_positional_arguments() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    inner = model.forward
    model.forward = lambda *a, **k: inner(*a, **k)
    accelerate(model, Config(cache=POLICY))
    with torch.no_grad():
        got = [model(inputs["hidden_states"], torch.full((1,), t), inputs["encoder_hidden_states"])[0] for t in TIMES]
    for mine, want in zip(got, expected(stock), strict=True):
        assert tiny.relative(mine, want) < 1e-5


def test_handles_leave_each_other_alone() -> None:
    model, inputs = tiny.wan()
    first = accelerate(model, Config(cache=POLICY))
    generate(model, inputs)
    first.remove()
    assert first.stats()["cache"]["nbytes"] == 0 and first.stats()["cache"]["forecast"] == {2: 1, 4: 1}
    second = accelerate(model, Config(cache=POLICY))
    first.remove()
    generate(model, inputs)
    assert second.stats()["cache"]["forecast"] == {2: 1, 4: 1}


def test_reconfigure_switches_the_cache() -> None:
    model, inputs = tiny.wan()
    stock = generate(model, inputs)
    handle = accelerate(model, "exact")
    assert handle.stats()["cache"] is None and "forward" not in model.__dict__
    handle.reconfigure(Config(cache=POLICY))
    generate(model, inputs)
    assert handle.stats()["cache"]["forecast"] == {2: 1, 4: 1}
    handle.reconfigure("exact")
    assert "forward" not in model.__dict__
    for mine, want in zip(generate(model, inputs), stock, strict=True):
        assert tiny.relative(mine, want) < 1e-5


def test_both_experts_keep_their_own_history() -> None:
    first, second = tiny.wan()[0], tiny.wan()[0]
    with torch.no_grad():
        second.proj_out.bias.add_(1.0)
    inputs = tiny.wan()[1]
    handle = accelerate(SimpleNamespace(transformer=first, transformer_2=second), Config(cache=POLICY))
    for t in TIMES[:2]:
        tiny.run(first, tiny.at(inputs, t))
    switched = tiny.run(second, tiny.at(inputs, TIMES[2]))  # its first call is computed, whatever the step
    assert handle.stats()["cache"]["forecast"] == {}
    assert tiny.relative(switched, tiny.run(tiny.wan()[0], tiny.at(inputs, TIMES[2])) + 1.0) < 1e-5


def test_wrong_places() -> None:
    model, _ = tiny.wan()
    with pytest.raises(RuntimeError, match="accelerate the whole transformer"):
        accelerate(model.blocks[0], Config(cache=POLICY, on_unsupported="error"))
    assert not tiny.served(model)
    handle = accelerate(model.blocks[0], Config(cache=POLICY))
    assert "no cache" in handle.report() and handle.stats()["cache"]["full"] == {}
    with pytest.raises(RuntimeError, match="accelerate the whole transformer"):
        handle.reconfigure(Config(cache=POLICY, on_unsupported="error"))
    assert handle.config == Config(cache=POLICY)  # not half applied
    with pytest.raises(TypeError, match="cache must be a cache policy"):
        Config(cache=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache"):
        Config.from_dict({"cache": {"method": "taylorseer", "damping": float("inf")}})


def test_whole_model_compilation_is_refused() -> None:
    model, inputs = tiny.wan(layers=1)
    accelerate(model, Config(cache=POLICY))
    with torch.no_grad(), pytest.raises(Exception, match="compile_repeated_blocks"):
        torch.compile(model, fullgraph=True, backend="eager")(**inputs)


def test_with_blocks_compiled_and_first_block_cache() -> None:
    from diffusers import FirstBlockCacheConfig

    model, inputs = tiny.wan(layers=3)
    stock = generate(model, inputs)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    accelerate(model, Config(cache=POLICY))
    with model.cache_context("cond"):
        got = generate(model, inputs)
    for mine, want in zip(got, expected(stock), strict=True):
        assert tiny.relative(mine, want) < 1e-5


def test_a_short_schedule_keeps_nothing() -> None:
    model, inputs = tiny.wan()
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=torch.tensor(TIMES)))
    for granularity in ("model", "span", "block", "module"):
        policy = TaylorSeer(first_full=0, min_steps=6, granularity=granularity)
        with accelerate(pipe, Config(cache=policy)) as handle:
            for value in TIMES:
                tiny.run(model, tiny.at(inputs, value))
            stats = handle.stats()["cache"]
        assert stats["nbytes"] == 0 and stats["full"] == {"a schedule of 5 steps, fewer than min_steps 6": 5}


def test_a_class_is_no_policy() -> None:
    with pytest.raises(TypeError, match=r"cache is the class TaylorSeer; pass an object of it, TaylorSeer\(\.\.\.\)"):
        Config(cache=TaylorSeer)  # type: ignore[arg-type]
