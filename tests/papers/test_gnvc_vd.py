"""GNVC-VD: Generative Neural Video Compression via Video Diffusion Prior (arXiv 2512.05016).

Decoded latents are the start of a short refinement that begins in the middle of the schedule, and an adaptor adds
features of the bitstream behind layers in the middle of the transformer.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.hooks import ResidualFeatures
from vdit_fast.planners import Draft

pytest.importorskip("diffusers")

STEPS, BEGIN = 50, 30
CONFIGS = {
    "exact": Config(),
    "a fraction of the steps": Config(attention=tiny.Band(width=2, dense_steps=0.7)),
    "a number of steps": Config(attention=tiny.Band(width=2, dense_steps=40)),
}


def refine(
    model: nn.Module,
    handle: Handle,
    inputs: dict[str, Any],
    x: Tensor,
    begin: int,
    end: int = STEPS,
    named: bool = True,
) -> list[Tensor]:
    sigmas = torch.linspace(1, 0, STEPS + 1)
    trail = [x]
    for step in range(begin, end):
        sigma, after = float(sigmas[step]), float(sigmas[step + 1])
        call = {**tiny.at(inputs, 1000 * sigma), "hidden_states": trail[-1]}
        if named:
            with handle.step(step, sigma=sigma, num_steps=STEPS):
                velocity = tiny.run(model, call)
        else:
            velocity = tiny.run(model, call)
        trail.append(trail[-1] + (after - sigma) * velocity)
    return trail


def wan(layers: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny.wan(layers=layers, frames=2)
    return model, {**inputs, "encoder_hidden_states": torch.randn(1, 5, 16)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_30_to_50_alone_are_the_tail_of_all_fifty(config: Config) -> None:
    """Bit by bit, from the same latents and step ids; rules about steps mean the schedule's, not the run's."""
    model, inputs = wan()
    handle = accelerate(model, config)
    whole = refine(model, handle, inputs, inputs["hidden_states"], 0)
    handle.reset()
    calls = handle.stats()["layers"][0]["sparse_calls"]
    tail = refine(model, handle, inputs, whole[BEGIN], BEGIN)
    assert len(tail) == STEPS - BEGIN + 1
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[BEGIN:], strict=True))
    if config.attention is not None:
        first = 35 if isinstance(config.attention.dense_steps, float) else 40
        assert calls == STEPS - first and handle.stats()["layers"][0]["sparse_calls"] == 2 * calls


def test_the_same_by_noise_level_where_steps_are_not_named() -> None:
    model, inputs = wan()
    handle = accelerate(model, Config(attention=Draft(sparsity=0.5, pool=(2, 2), dense_steps=0.7)))
    whole = refine(model, handle, inputs, inputs["hidden_states"], 0, named=False)
    assert handle.stats()["layers"][0]["sparse_calls"] == 15
    handle.reset()
    tail = refine(model, handle, inputs, whole[BEGIN], BEGIN, named=False)
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[BEGIN:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["wan_t2v", "cogvideox_5b", "hunyuan_video"])
def test_an_adaptor_at_zero_is_the_base_model(family: str, dtype: torch.dtype) -> None:
    model, inputs = tiny.build(family)
    model, inputs = model.to(dtype), tiny.cast(inputs, dtype)
    handle = accelerate(model)
    plain = tiny.run(model, inputs)
    seen: list[tuple[int, ...]] = []
    handle.hook("block_output", lambda step, place, rows: seen.append(tuple(rows.video.shape)), layers=0)
    tiny.run(model, inputs)
    _, tokens, channels = seen[0]
    zero = nn.Linear(6, channels).requires_grad_(False).to(dtype)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    features = torch.randn(1, tokens, 6, dtype=dtype)
    hook = ResidualFeatures({0: features, 1: features}, {0: zero, 1: zero})
    handle.hook("block_output", hook)
    assert torch.equal(tiny.run(model, inputs), plain)
    nn.init.normal_(zero.weight)
    assert tiny.relative(tiny.run(model, inputs), plain) > 1e-2
    hook.features = {}
    assert torch.equal(tiny.run(model, inputs), plain)


def test_features_enter_behind_the_layers_in_the_middle() -> None:
    """What a block gives on is its own output plus the features; layers before are as they were."""
    model, inputs = wan(layers=4)
    handle = accelerate(model)
    before: list[Tensor] = []
    after: list[Tensor] = []
    handle.hook("block_output", lambda step, place, rows: before.append(rows.video.clone()))
    handle.hook("block_output", ResidualFeatures({1: torch.randn(1, 32, 32), 2: lambda *_: None}, scale=0.5))
    handle.hook("block_output", lambda step, place, rows: after.append(rows.video.clone()))
    tiny.run(model, inputs)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]
    with pytest.raises(ValueError, match=r"is \[1, 31, 32\], expected \[1 or 1, 32, 32\]"):
        handle.hook("block_output", ResidualFeatures({1: torch.randn(1, 31, 32)}))
        tiny.run(model, inputs)
