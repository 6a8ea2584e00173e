"""Policies that choose spans of blocks by step or by what changes: which blocks run, and what comes out."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_cache_blocks import blocks_of, equal, generate
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import DeltaDiT, FirstBlock, TaylorSeer, TeaCache
from vdit_fast.config import Config

STEADY: dict[str, Any] = {"first_full": 1, "last_full": 0}


def steps(model: nn.Module, inputs: dict[str, Any], count: int, noise: dict[int, float] | None = None) -> list[Tensor]:
    """Steps whose inputs move slowly; ``noise`` is added before some of them."""
    found, latents = [], inputs["hidden_states"]
    drift = torch.randn_like(latents) * 1e-3
    for step in range(count):
        latents = latents + drift + (noise or {}).get(step, 0.0) * torch.randn_like(latents)
        found.append(tiny.run(model, tiny.at({**inputs, "hidden_states": latents}, 900.0 - step / 64)))
    return found


def test_first_block_serves_every_family_with_known_blocks(family: str) -> None:
    model, inputs = tiny.build(family)
    with accelerate(model) as handle:
        count = blocks_of(handle)
        plain = generate(model, inputs, branches=2)
    if not count:
        with pytest.raises(RuntimeError, match="there it is 'model'"):
            accelerate(model, Config(cache=FirstBlock()))
        return
    if count < 2:
        with pytest.raises(ValueError, match="at least 2 blocks, this one has 1"):
            accelerate(model, Config(cache=FirstBlock()))
        assert not tiny.served(model)
        return
    with accelerate(model, Config(cache=FirstBlock(threshold=0.0, **STEADY))) as handle:
        assert equal(generate(model, inputs, branches=2), plain)  # nothing is below 0
        assert handle.stats()["cache"]["blocks_left_out"] == 0
        assert handle.stats()["cache"]["host_reads"] == 4  # of 5 steps the first is computed anyway
    with accelerate(model, Config(cache=FirstBlock(threshold=1e9, interval=3, **STEADY))) as handle:
        generate(model, inputs, branches=2)
        stats = handle.stats()["cache"]
        assert stats["forecast"] == {1: 2, 2: 2, 4: 2}
        assert stats["blocks_left_out"] == 6 * (count - 1) and stats["blocks_run"] == 4 * count + 6
        assert stats["host_reads"] == 3


def test_first_block_looks_at_what_the_first_block_adds() -> None:
    """Steps are computed when the first block's residual has moved from the last computed one's by the threshold."""
    model, inputs = tiny.wan(layers=3)
    residuals: list[Tensor] = []
    hook = model.blocks[0].register_forward_hook(
        lambda module, args, output: residuals.append(output - args[0]), with_kwargs=False
    )
    torch.manual_seed(3)
    steps(model, inputs, 8)
    hook.remove()
    base, computed = residuals[0], [0]
    threshold = 2.5 * float((residuals[1] - base).abs().mean() / base.abs().mean())
    for step, now in enumerate(residuals[1:], 1):
        if float((now - base).abs().mean() / base.abs().mean()) >= threshold:
            base = now
            computed.append(step)
    assert 2 < len(computed) < 7
    handle = accelerate(model, Config(cache=FirstBlock(threshold=threshold, interval=99, **STEADY)))
    torch.manual_seed(3)
    steps(model, inputs, 8)
    assert sorted(set(range(8)) - set(handle.stats()["cache"]["forecast"])) == computed


def test_noise_between_steps_fires_a_refresh() -> None:
    """Latents edited between steps (DiffSynth, sheet section 10 L9): what was kept is not used for them."""
    model, inputs = tiny.wan(layers=3)
    for policy in (FirstBlock, TeaCache):
        for noise, computed in (({}, [0]), ({4: 0.5}, [0, 4])):
            with accelerate(model, Config(cache=policy(threshold=0.2, interval=99, **STEADY))) as handle:
                steps(model, inputs, 7, noise)
                assert sorted(set(range(7)) - set(handle.stats()["cache"]["forecast"])) == computed


def test_both_branches_of_a_step_do_the_same() -> None:
    """The first branch decides: the second follows, although its own residual would say otherwise."""
    model, inputs = tiny.wan(layers=3)
    handle = accelerate(model, Config(cache=FirstBlock(threshold=0.05, interval=99, **STEADY)))
    latents = torch.randn(6, *inputs["hidden_states"].shape)

    def run(moving: int) -> None:
        for step in range(6):
            for branch in range(2):
                moved = {**inputs, "hidden_states": latents[step if branch == moving else 0]}
                tiny.run(model, tiny.at(moved, 900.0 - step / 64))

    run(moving=1)
    stats = handle.stats()["cache"]
    assert stats["forecast"] == {step: 2 for step in range(1, 6)} and stats["host_reads"] == 5
    handle.reset()
    run(moving=0)
    assert sum(handle.stats()["cache"]["full"].values()) == 2 + 12


def test_first_block_forecasts_with_the_last_computed_offset() -> None:
    """A constant input: the offset reused is the computed one. Its estimate is what it holds."""
    model, inputs = tiny.wan(layers=3)
    with accelerate(model):
        plain = tiny.run(model, tiny.at(inputs, 899.0))
    handle = accelerate(model, Config(cache=FirstBlock(threshold=0.05, **STEADY)))
    tiny.run(model, tiny.at(inputs, 900.0))
    assert tiny.relative(tiny.run(model, tiny.at(inputs, 899.0)), plain) < 0.02
    features = inputs["hidden_states"].numel() // 16 * 32
    assert handle.stats()["cache"]["nbytes"] == 2 * features * 4  # the span's offset, and the first block's residual


def test_delta_dit_executes_all_blocks_but_its_span() -> None:
    model, inputs = tiny.wan(layers=5)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.attn1.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    handle = accelerate(model, Config(cache=DeltaDiT(bound=4, length=2, interval=3, **STEADY)))
    calls = []
    for step in range(8):
        ran.clear()
        tiny.run(model, tiny.at(inputs, 900.0 - step))
        calls.append(tuple(ran))
    everything, rear, front = tuple(range(5)), (0, 1, 2), (2, 3, 4)
    assert calls == [everything, rear, rear, everything, everything, front, front, everything]  # 4: the span changes
    assert "nothing to forecast from yet" in handle.stats()["cache"]["full"]
    features = inputs["hidden_states"].numel() // 16 * 32
    assert handle.stats()["cache"]["nbytes"] == features * 4  # the rear span's offset is gone


def test_a_span_over_all_blocks_is_a_residual_cache() -> None:
    model, inputs = tiny.wan(layers=3)
    got = []
    policies = (
        DeltaDiT(length=3, interval=3, **STEADY),
        TaylorSeer(granularity="span", order=0, interval=3, **STEADY),
    )
    for policy in policies:
        torch.manual_seed(3)
        with accelerate(model, Config(cache=policy)) as handle:
            got.append(steps(model, inputs, 6))
            assert handle.stats()["cache"]["forecast"] == {1: 1, 2: 1, 4: 1, 5: 1}
    assert equal(*got)


def test_two_experts_and_copies_keep_their_own_verdicts() -> None:
    first, inputs = tiny.wan(layers=3)
    second = copy.deepcopy(first)
    config = Config(cache=FirstBlock(threshold=1e9, interval=99, **STEADY))
    handle = accelerate(SimpleNamespace(transformer=first, transformer_2=second), config)
    for step in range(4):
        tiny.run(first if step < 2 else second, tiny.at(inputs, 900.0 - step))
    assert handle.stats()["cache"]["forecast"] == {1: 1, 3: 1}


def test_w2sd_repeats_steps_under_a_cache_that_refreshes_every_call() -> None:
    """Reflection runs a step again and runs backward: nothing is forecast from the future, and no bit changes."""
    model, inputs = tiny.wan(layers=3)
    order = (900.0, 800.0, 900.0, 800.0, 700.0, 800.0, 700.0, 600.0)
    with accelerate(model):
        plain = [tiny.run(model, tiny.at(inputs, t)) for t in order]
    for policy in (
        FirstBlock(threshold=0.0, **STEADY),
        DeltaDiT(interval=1, **STEADY),
        TaylorSeer(granularity="block", interval=1, **STEADY),
        TaylorSeer(granularity="span", interval=1, **STEADY),
    ):
        with accelerate(model, Config(cache=policy)) as handle:
            assert equal([tiny.run(model, tiny.at(inputs, t)) for t in order], plain)
            assert handle.stats()["cache"]["forecast"] == {}


def test_teacache_looks_at_what_attention_gets(family: str) -> None:
    """The modulated input is what the first block's self-attention is called with; its changes add up."""
    model, inputs = tiny.build(family)
    with accelerate(model) as handle:
        count, adapter = blocks_of(handle), handle.roots[0].adapter
    if not count:
        with pytest.raises(RuntimeError, match="there it is 'model'"):
            accelerate(model, Config(cache=TeaCache()))
        return
    seen: list[Tensor] = []
    first = model.get_submodule(f"{adapter.block_lists[0]}.0")
    attention = next(getattr(first, name) for name in ("attn1", "attn") if hasattr(first, name))

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = attention.register_forward_pre_hook(note, with_kwargs=True)
    for step in range(6):
        tiny.run(model, tiny.at(inputs, 900.0 - step * step))
    hook.remove()
    changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(seen)]
    threshold = 1.01 * (changes[0] + changes[1])
    total, computed = 0.0, [0]
    for step, change in enumerate(changes, 1):
        total += change
        if total >= threshold:
            total = 0.0
            computed.append(step)
    assert 1 < len(computed) < 6
    with accelerate(model, Config(cache=TeaCache(threshold=threshold, interval=99, **STEADY))) as handle:
        for step in range(6):
            tiny.run(model, tiny.at(inputs, 900.0 - step * step))
        stats = handle.stats()["cache"]
        assert sorted(set(range(6)) - set(stats["forecast"])) == computed and stats["host_reads"] == 5
        assert stats["blocks_left_out"] == (6 - len(computed)) * count


@pytest.mark.parametrize("granularity", ["model", "span", "block", "module"])
def test_parts_of_a_schedule_and_steps_in_any_order(granularity: str) -> None:
    """Refinement begins late in the schedule, restoration calls at any noise: a step with more noise begins anew, and
    nothing is forecast from before it."""
    model, inputs = tiny.wan(layers=3)
    times = torch.tensor([900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0])
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=times))
    with accelerate(pipe):
        plain = [tiny.run(model, tiny.at(inputs, float(t))) for t in times]
    knobs: dict[str, Any] = {"granularity": granularity, "first_full": 0.25, "interval": 9}
    for order, forecast in (
        ((4, 5, 6, 7), [6]),  # two of eight steps from the first one seen, and the last
        ((6, 2, 3, 4, 0, 1, 3), [4, 3]),
        ((5, 5, 5, 6), []),  # three guidance branches, the first of which goes on
        ((7, 6, 5, 4), []),
    ):
        with accelerate(pipe, Config(cache=TaylorSeer(**knobs))) as handle:
            got = [tiny.run(model, tiny.at(inputs, float(times[step]))) for step in order]
            assert handle.stats()["cache"]["forecast"] == dict.fromkeys(sorted(forecast), 1)
            wrong = [step for step, x in zip(order, got, strict=True) if not torch.equal(x, plain[step])]
            assert wrong == forecast
    with accelerate(pipe, Config(cache=TaylorSeer(**knobs))) as handle:
        for step in (0, 1, 2):  # a run that was broken off
            tiny.run(model, tiny.at(inputs, float(times[step])))
        handle.reset()
        late = tiny.run(model, tiny.at(inputs, float(times[4])))
        assert torch.equal(late, plain[4]) and handle.stats()["cache"]["forecast"] == {2: 1}
    noisy = TaylorSeer(granularity=granularity, first_full=0, last_full=0, full_above=0.65, full_below=0.25, interval=9)
    with accelerate(pipe, Config(cache=noisy)) as handle:
        for t in times:
            tiny.run(model, tiny.at(inputs, float(t)))
        assert sorted(handle.stats()["cache"]["forecast"]) == [3, 4, 5, 6]
