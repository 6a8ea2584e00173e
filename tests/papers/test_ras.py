"""RAS, Region-Adaptive Sampling for Diffusion Transformers (arXiv 2502.10389): row 47, with check B1a."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny
import torch
from torch import Tensor

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.models.row_keys import KeptKeys
from vdit_fast.subset import RAS

GRID = (2, 30, 52)  # 480p has 30 x 52 tokens per frame: nothing about it is square
TOKENS = 2 * 30 * 52


def test_b1a_refreshed_keys_are_those_of_the_dense_run() -> None:
    """If only the active tokens' keys and values changed, attention over the kept ones, refreshed at the active rows,
    is the dense attention's active rows; text rows behind the video included."""
    q, k, v = (torch.randn(2, 67, 3, 16) for _ in range(3))
    rows = torch.cat([torch.randperm(60)[:25].sort().values, torch.arange(60, 67)]).to(torch.int32)
    index = rows.long()
    kept = KeptKeys()
    kept.keep(0, k, v)
    new_k, new_v = k.clone(), v.clone()
    new_k[:, index], new_v[:, index] = torch.randn(2, 32, 3, 16), torch.randn(2, 32, 3, 16)
    kept_k, kept_v = kept.refresh(0, new_k[:, index], new_v[:, index], rows[None])
    assert torch.equal(kept_k, new_k) and torch.equal(kept_v, new_v)
    got = vdit_fast.attention(q[:, index], kept_k, kept_v)
    torch.testing.assert_close(got, vdit_fast.attention(q, new_k, new_v)[:, index])
    assert not torch.allclose(got, vdit_fast.attention(q[:, index], k, v), atol=1e-2)


def draw(config: Config | None, steps: int = 8, frames: int = 1, height: int = 60, width: int = 104):
    """A flow-matching Euler run of a tiny Wan, with guidance: latents and guided velocities of every step."""
    torch.manual_seed(0)
    model, inputs = tiny.wan()
    handle = accelerate(model, config if config is not None else "exact")
    x, blank = torch.randn(1, 4, frames, height, width), torch.zeros_like(inputs["encoder_hidden_states"])
    sigmas = torch.linspace(1, 0, steps + 1)
    states, velocities = [x], []
    for sigma, after in itertools.pairwise(sigmas):
        call = {**inputs, "hidden_states": x, "timestep": sigma.view(1) * 1000}
        given, free = (tiny.run(model, call | {"encoder_hidden_states": text}) for text in
                       (inputs["encoder_hidden_states"], blank))  # fmt: skip
        velocity = free + 4.0 * (given - free)
        x = x + (after - sigma) * velocity
        states.append(x)
        velocities.append(velocity)
    return states, velocities, handle, sigmas


def test_all_tokens_active_is_the_dense_run_bit_for_bit() -> None:
    want, _, _, _ = draw(None, steps=4, height=12, width=20)
    got, _, _, _ = draw(Config(subset=RAS(sample_ratio=1, start=1)), steps=4, height=12, width=20)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_idle_tokens_move_by_the_old_velocity_on_a_grid_that_is_not_square() -> None:
    """Their latents advance by exactly (sigma' - sigma) times the guided velocity of their last computed step."""
    states, velocities, handle, sigmas = draw(Config(subset=RAS(start=2, sample_ratio=0.5, reset=(5,))))
    stats = handle.stats()["subset"]
    assert stats["partial"] == {2: 2, 3: 2, 4: 2, 6: 2, 7: 2}
    assert stats["left"] == 10 * (30 * 52 // 2) and stats["whole"] == {"one of the first 2 steps": 4, "a reset step": 2}
    idle_before = None
    for step in (2, 3, 4, 6, 7):
        idle = (velocities[step] == velocities[step - 1]).all(1)  # [1, F, H, W]: every channel of the guided velocity
        tokens = idle.unflatten(2, (30, 2)).unflatten(4, (52, 2)).float().mean((3, 5))
        assert tokens.unique().tolist() == [0.0, 1.0] and int(tokens.sum()) == 30 * 52 // 2  # whole patches
        moved = states[step + 1] - (states[step] + (sigmas[step + 1] - sigmas[step]) * velocities[step - 1])
        still = idle.unsqueeze(1).expand_as(moved)
        assert not moved[still].any() and moved[~still].any()
        assert idle_before is None or not torch.equal(idle, idle_before)
        idle_before = idle


def measures(tokens: int = TOKENS) -> Tensor:
    """As a step's outputs have them: within a factor of 20 of each other."""
    return torch.exp(3.0 * torch.rand(tokens))


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sample_ratio", [0.125, 0.5, 0.9])
def test_which_tokens_are_left_out(high_ratio: float, sample_ratio: float) -> None:
    measure, policy = measures(), RAS(sample_ratio=sample_ratio, high_ratio=high_ratio)
    rows = policy.choose(measure, torch.zeros(TOKENS)).long()
    skip = round((1 - sample_ratio) * TOKENS)  # 2730, 1560 and 312, whole numbers but for the binary fractions
    high = math.floor(high_ratio * skip + 0.5)
    order = measure.argsort()
    want = order[skip - high : TOKENS - high].sort().values
    assert torch.equal(rows, want) and len(rows) == policy.active(TOKENS) == TOKENS - skip


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
def test_starvation_brings_every_token_back(high_ratio: float) -> None:
    """With measures that never change, the counts of two tokens drift apart until the factor makes up for the measures,
    and no further: ln(largest / smallest) / starvation, and the few steps in which a token crosses the border."""
    policy, measure = RAS(starvation=0.5, high_ratio=high_ratio), measures(503)
    skipped, visited = torch.zeros(503), torch.zeros(503, dtype=torch.bool)
    for _ in range(60):
        rows = policy.choose(measure, skipped).long()
        skipped += 1
        skipped[rows] -= 1
        visited[rows] = True
    assert visited.all()
    if high_ratio in (0.0, 1.0):
        assert skipped.max() - skipped.min() <= math.log(float(measure.max() / measure.min())) / 0.5 + 2
    without = RAS(starvation=0.0, high_ratio=high_ratio)
    assert torch.equal(without.choose(measure, skipped), without.choose(measure, torch.zeros(503)))


def test_the_measure_is_the_deviation_over_channels_averaged_over_the_patch() -> None:
    output = torch.randn(2, 7, 4, 16)
    want = torch.stack([output[:, n].var(-1, unbiased=False).sqrt().mean() for n in range(7)])
    torch.testing.assert_close(RAS().measure(output), want)
    torch.testing.assert_close(RAS(metric="l2").measure(output), output.square().sum(-1).sqrt().mean((0, 2)))
    assert torch.equal(RAS().measure(output.half()), RAS().measure(output.half().float()))


def test_a_measure_of_zero_and_of_infinity() -> None:
    measure = torch.ones(10)
    measure[3], measure[4] = 0.0, math.inf
    rows = RAS(sample_ratio=0.9, high_ratio=0).choose(measure, torch.zeros(10)).tolist()
    assert rows == [n for n in range(10) if n != 3]
    rows = RAS(sample_ratio=0.9, high_ratio=1).choose(measure, torch.zeros(10)).tolist()
    assert rows == [n for n in range(10) if n != 4]
