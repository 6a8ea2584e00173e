"""Δ-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers (arXiv 2406.01125)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import DeltaDiT, TaylorSeer
from vdit_fast.config import Config

STEADY: dict[str, Any] = {"first_full": 1, "last_full": 0}


def wan(layers: int) -> Any:
    tiny = pytest.importorskip("tiny")
    return tiny.wan(layers=layers)


def clip(model: Any, inputs: dict[str, Any], steps: int) -> list[Tensor]:
    import tiny

    latents = torch.randn(steps, *inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    return [
        tiny.run(model, tiny.at({**inputs, "hidden_states": latents[step]}, 900.0 - 50 * step)) for step in range(steps)
    ]


def residuals(model: Any) -> list[tuple[Tensor, Tensor]]:
    """The residual stream before the first and after the last block, of every later forward."""
    found: list[tuple[Tensor, Tensor]] = []
    before: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: before.append(args[0].double()))
    model.norm_out.register_forward_pre_hook(lambda module, args: found.append((before[-1], args[0].double())))
    return found


def test_d1_the_newest_input_flows_and_the_error_is_the_change_of_the_offset() -> None:
    """x' + Δ(x) instead of x' + Δ(x'): exact for the same input, else wrong by Δ(x) - Δ(x')."""
    model, inputs = wan(3)
    stock = residuals(model)
    clip(model, inputs, 3)
    with accelerate(model, Config(cache=DeltaDiT(length=3, interval=9, **STEADY))):
        cached = residuals(model)
        clip(model, inputs, 3)
    offset = cached[0][1] - cached[0][0]
    for (x, y), (same_x, true) in zip(cached[1:], stock[1:3], strict=True):
        torch.testing.assert_close(x, same_x)
        torch.testing.assert_close(y, x + offset, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y - true, offset - (true - x), rtol=1e-4, atol=1e-4)
        assert float((y - true).norm()) > 1e-2


def test_the_same_input_twice_is_dense() -> None:
    import tiny

    model, inputs = wan(3)
    with accelerate(model):
        plain = tiny.run(model, tiny.at(inputs, 900.0))
    with accelerate(model, Config(cache=DeltaDiT(length=2, **STEADY))) as handle:
        tiny.run(model, tiny.at(inputs, 900.0))
        again = tiny.run(model, tiny.at(inputs, 899.9999))
        assert handle.stats()["cache"]["forecast"] == {1: 1}
    assert tiny.relative(again, plain) < 1e-4


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_executed_blocks_are_all_but_the_span(length: int) -> None:
    """L - N_c blocks per step, rear ones left out early and front ones late; the step of the change is computed."""
    model, inputs = wan(5)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.ffn.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    starts: list[int] = []
    model.register_forward_pre_hook(lambda module, args: starts.append(len(ran)))
    with accelerate(model, Config(cache=DeltaDiT(bound=4, length=length, interval=2, **STEADY))) as handle:
        clip(model, inputs, 8)
        stats = handle.stats()["cache"]
    calls = [ran[a:b] for a, b in zip(starts, [*starts[1:], len(ran)], strict=True)]
    everything, forecast = list(range(5)), {1, 3, 5, 7}
    for step, blocks in enumerate(calls):
        left_out = [] if step not in forecast else everything[-length:] if step < 4 else everything[:length]
        assert blocks == [index for index in everything if index not in left_out]
    assert stats["blocks_left_out"] == 4 * length and stats["blocks_run"] == 8 * 5 - 4 * length


def test_a_span_of_all_blocks_is_a_residual_cache() -> None:
    """Δ over every block is what TeaCache and first-block caches keep: all of order 0 and granularity "span"."""
    model, inputs = wan(4)
    got = []
    for policy in (
        DeltaDiT(length=4, interval=3, **STEADY),
        TaylorSeer(granularity="span", order=0, interval=3, **STEADY),
    ):
        with accelerate(model, Config(cache=policy)) as handle:
            got.append(clip(model, inputs, 7))
            assert handle.stats()["cache"]["forecast"] == {1: 1, 2: 1, 4: 1, 5: 1}
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_interval_1_is_no_cache_and_two_runs_give_the_same_clip() -> None:
    model, inputs = wan(4)
    with accelerate(model):
        plain = clip(model, inputs, 6)
    with accelerate(model, Config(cache=DeltaDiT(interval=1, **STEADY))):
        assert all(torch.equal(a, b) for a, b in zip(clip(model, inputs, 6), plain, strict=True))
    with accelerate(model, Config(cache=DeltaDiT(interval=2, bound=2, **STEADY))):
        first, second = clip(model, inputs, 6), clip(model, inputs, 6)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
