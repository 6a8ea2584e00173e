"""AnimateLCM: Computation-Efficient Personalized Style Video Generation without Personalized Video Data
(arXiv 2402.00769).

AnimateDiff's motion modules, 16 frames and 8 heads of 40, 80 or 160 columns, in a model that makes a video in four
steps: there is nothing between the steps to reuse, and nothing may be.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from paper_checks import Operators, as_exact_as_torch
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer
from vdit_fast.config import Config
from vdit_fast.models.kernels import cuda_limit

pytest.importorskip("diffusers")

FRAMES = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [40, 80, 160])
def test_motion_modules_of_every_width(dim, dtype):
    q, k, v = torch.randn(3, 2, FRAMES, 30, 8, dim).to(dtype).unbind()
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (vdit_fast.short_attention(q, k, v), q, k, v)]
    as_exact_as_torch(*rows)
    assert cuda_limit(torch.float16, dim) is None  # nor does the GPU kernel refuse them


def widths_of_the_paper() -> tuple[nn.Module, dict[str, Any]]:
    """An AnimateDiff UNet with one head of each of the widths, and random weights."""
    from diffusers import UNetMotionModel

    torch.manual_seed(1)
    model = UNetMotionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(40, 80, 160), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=16,
        num_attention_heads=1, norm_num_groups=8, motion_num_attention_heads=1, motion_max_seq_length=32,
    )  # fmt: skip
    return model.eval().requires_grad_(False), {
        "sample": torch.randn(1, 4, FRAMES, 4, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16).repeat_interleave(FRAMES, 0),
        "return_dict": False,
    }


class FourSteps:
    """A pipeline stand-in: latent consistency sampling."""

    def __init__(self, unet: nn.Module, inputs: dict[str, Any]) -> None:
        from diffusers import LCMScheduler

        self.unet, self.inputs, self.scheduler = unet, inputs, LCMScheduler()

    def __call__(self) -> list[Tensor]:
        """Latents after every step."""
        self.scheduler.set_timesteps(4)
        latents, trail = self.inputs["sample"], []
        noise = torch.Generator().manual_seed(3)
        for t in self.scheduler.timesteps:
            answer = tiny.run(self.unet, {**self.inputs, "sample": latents, "timestep": t})
            latents = self.scheduler.step(answer, t, latents, generator=noise, return_dict=False)[0]
            trail.append(latents)
        return trail


def test_every_width_is_served_in_the_model():
    model, inputs = widths_of_the_paper()
    inputs["timestep"] = torch.tensor(500)
    stock = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    handle = accelerate(model)
    with Operators() as operators:
        tiny.exact_enough(tiny.run(model, inputs), stock, truth)
    layers = handle.stats()["layers"]
    motion = [layer["name"] for layer in layers if "motion_modules" in layer["name"]]
    widths = {model.get_submodule(name).to_q.out_features // model.get_submodule(name).heads for name in motion}
    assert widths == {40, 80, 160}
    assert all(layer["calls"] == 1 and not layer["fallbacks"] for layer in layers)
    assert operators.ran["short_attention"] >= len(motion)


def test_four_steps_reuse_nothing():
    """A run is four forwards that know nothing of each other: each gives what a model gives that made no other."""
    model, inputs = tiny.build("animatediff")
    pipe = FourSteps(model, inputs)
    stock = pipe()
    twin = FourSteps(copy.deepcopy(model), inputs)
    handle = accelerate(pipe)
    assert handle.config.cache is None and handle.stats()["cache"] is None
    run = pipe()
    for mine, eager in zip(run, stock, strict=True):
        assert tiny.relative(mine, eager) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(pipe(), run, strict=True))  # nor does a second run
    assert all(layer["calls"] == 8 for layer in handle.stats()["layers"])
    latents = inputs["sample"]
    for t, after in zip(pipe.scheduler.timesteps, run, strict=True):
        alone = accelerate(twin.unet)
        assert torch.equal(
            tiny.run(twin.unet, {**inputs, "sample": latents, "timestep": t}),
            tiny.run(pipe.unet, {**inputs, "sample": latents, "timestep": t}),
        )
        alone.remove()
        latents = after


def test_a_cache_with_nothing_to_skip_changes_no_bit():
    model, inputs = tiny.build("animatediff")
    pipe = FourSteps(model, inputs)
    handle = accelerate(pipe)
    exact = pipe()
    handle.reconfigure(Config(cache=TaylorSeer(first_full=4, last_full=0, interval=2)))
    assert all(torch.equal(a, b) for a, b in zip(pipe(), exact, strict=True))
    assert sum(handle.stats()["cache"]["full"].values()) == 4 and not handle.stats()["cache"]["forecast"]
    handle.reconfigure(Config(cache=TaylorSeer(first_full=1, last_full=0, interval=2)))
    assert not torch.equal(pipe()[-1], exact[-1])  # one that does skip does
    handle.reconfigure("exact")
    assert all(torch.equal(a, b) for a, b in zip(pipe(), exact, strict=True))
