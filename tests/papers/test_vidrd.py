"""VidRD: Reuse and Diffuse, Iterative Denoising for Text-to-Video Generation (arXiv 2309.03549).

A long video is made clip by clip. The frames that a clip shares with the one before start from that clip's latents,
noised again, the others from noise; a clip may begin in the middle of the schedule, and latents are exchanged between
steps. The accelerated model must not take a later clip for a continuation of an earlier one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.planners import Rettention

pytest.importorskip("diffusers")

STEPS = 8
CONFIGS = {
    "exact": Config(),
    "depends on the step": Config(attention=tiny.Band(width=2, dense_steps=0.5)),
    "remembers statistics": Config(attention=Rettention(window=0.3, dense_steps=0, interval=4)),
    "remembers outputs": Config(cache=TaylorSeer(first_full=2, last_full=1, interval=2)),
}


class ClipByClip:
    """A pipeline stand-in: Euler steps of a flow-matching schedule from any step on, over a random tiny Wan."""

    def __init__(self, transformer: nn.Module, inputs: dict[str, Any]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)
        self.inputs = inputs

    def noised(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        sigma = self.scheduler.sigmas[step]
        return (1 - sigma) * clean + sigma * noise

    def denoise(self, latents: Tensor, begin: int = 0, known: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """Latents before every step and after the last; ``known`` (clean, noise) frames overwrite the first ones."""
        trail = [latents]
        for step in range(begin, STEPS):
            latents = trail[-1]
            if known is not None:
                frames = known[0].shape[2]
                latents = torch.cat([self.noised(*known, step), latents[:, :, frames:]], 2)
            inputs = {**self.inputs, "hidden_states": latents}
            inputs["timestep"] = self.scheduler.timesteps[step].expand(len(latents))
            delta = self.scheduler.sigmas[step + 1] - self.scheduler.sigmas[step]
            trail.append(latents + delta * tiny.run(self.transformer, inputs))
        return trail


def pipelines() -> tuple[ClipByClip, ClipByClip, Tensor, Tensor]:
    """Two equal pipelines, and two noises of a clip."""
    model, inputs = tiny.wan()
    inputs["encoder_hidden_states"] = torch.randn(1, 9, 16)
    pair = [ClipByClip(m, inputs) for m in (model, copy.deepcopy(model))]
    first, second = torch.randn(2, *inputs["hidden_states"].shape)
    return *pair, first, second


@pytest.mark.parametrize("anew", [False, True], ids=["same schedule", "schedule set anew"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_clip_that_overlaps_wholly_is_a_rerun_from_that_step(config, anew):
    """Bit by bit what a model gives that never made the first clip."""
    pipe, fresh, noise, again = pipelines()
    handle, _ = accelerate(pipe, config), accelerate(fresh, config)
    begin = 3
    start = pipe.noised(pipe.denoise(noise)[-1], again, begin)
    if anew:
        pipe.scheduler.set_timesteps(STEPS)
    later = pipe.denoise(start, begin)
    rerun = fresh.denoise(start, begin)
    assert all(torch.equal(a, b) for a, b in zip(later, rerun, strict=True))
    assert handle.stats()["generations"] == 2


@pytest.mark.parametrize("config", [CONFIGS["exact"], CONFIGS["depends on the step"]], ids=["exact", "step"])
def test_beginning_in_the_middle_is_the_tail_of_the_whole(config):
    """Without memory between steps, steps 3 to 7 alone are the end of steps 0 to 7."""
    pipe, fresh, noise, _ = pipelines()
    accelerate(pipe, config), accelerate(fresh, config)
    whole = pipe.denoise(noise)
    tail = fresh.denoise(whole[3], 3)
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[3:], strict=True))


@pytest.mark.parametrize("told", ["by reset", "by the schedule"])
def test_a_clip_that_begins_where_the_last_one_ended_needs_to_be_told(told):
    """The same timestep again is taken for another guidance branch, unless it is said that a generation begins."""
    config = CONFIGS["remembers statistics"]
    pipe, fresh, noise, again = pipelines()
    handle, _ = accelerate(pipe, config), accelerate(fresh, config)
    begin = STEPS - 1
    start = pipe.noised(pipe.denoise(noise)[-1], again, begin)
    pipe.denoise(start, begin)
    assert handle.stats()["generations"] == 1
    if told == "by reset":
        handle.reset()
    else:
        pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(pipe.denoise(start, begin)[-1], fresh.denoise(start, begin)[-1])
    assert handle.stats()["generations"] == 2


@pytest.mark.parametrize("overlap", [1, 2])
def test_latents_exchanged_between_the_steps(overlap):
    """Shared frames are overwritten before every step: the stock model's answer, the schedule's steps."""
    pipe, stock, noise, again = pipelines()
    clean = stock.denoise(noise)[-1]
    known = clean[:, :, -overlap:], again[:, :, :overlap]
    want = stock.denoise(again, known=known)
    handle = accelerate(pipe)
    for a, b in zip(pipe.denoise(again, known=known), want, strict=True):
        assert tiny.relative(a, b) < 2e-6
    handle.reconfigure(CONFIGS["depends on the step"])
    for _ in range(2):  # a clip after a clip: what the first left behind is gone
        pipe.denoise(again, known=known)
    (root,) = handle.roots
    assert [step for layer, step, _, _ in root.session.state["seen"] if layer == 0] == [4, 5, 6, 7]
