"""One step of frames at different steps, against diffusers' schedulers frame by frame."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vdit_fast.streaming import DDIM, FlowEuler

STEPS = 8


def ddim(**options):
    scheduler = DDIMScheduler(**{"clip_sample": False} | options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def euler(shift=3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_diffusers_frame_by_frame(prediction, spacing):
    """Bit for bit, the final step and a schedule with an offset included."""
    scheduler = ddim(prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=False, steps_offset=1)
    sampler = DDIM.from_scheduler(scheduler)
    assert sampler.timesteps == tuple(float(t) for t in scheduler.timesteps)
    x, predicted = torch.randn(2, 2, 3, STEPS, 4, 5).unbind()
    done = [7, 3, 3, 0, 1, 6, 2, 5]
    got = sampler.move(x, predicted, done)
    for frame, n in enumerate(done):
        want = scheduler.step(predicted[:, :, frame], scheduler.timesteps[n], x[:, :, frame]).prev_sample
        assert torch.equal(got[:, :, frame], want), n


def test_euler_is_diffusers_frame_by_frame():
    sampler = FlowEuler.from_scheduler(euler())
    x, predicted = torch.randn(2, 2, 3, STEPS, 4, 5).unbind()
    done = [7, 3, 3, 0, 1, 6, 2, 5]
    got = sampler.move(x, predicted, done)
    for frame, n in enumerate(done):
        scheduler = euler()
        scheduler.set_begin_index(n)
        assert sampler.timesteps[n] == float(scheduler.timesteps[n])
        want = scheduler.step(predicted[:, :, frame], scheduler.timesteps[n], x[:, :, frame]).prev_sample
        assert torch.equal(got[:, :, frame], want), n


def test_euler_of_a_clean_prediction():
    """The velocity that a prediction of x0 means; the last step gives it."""
    sigmas = [1.0, 0.6, 0.3, 0.02, 0.0]
    clean, speed = FlowEuler(sigmas, "sample", floor=0.05), FlowEuler(sigmas)
    x, x0 = torch.randn(2, 1, 3, 4, 2, 2, dtype=torch.float64).unbind()
    done = [0, 1, 2, 3]
    floor = torch.tensor([1.0, 0.6, 0.3, 0.05], dtype=torch.float64).view(4, 1, 1)
    want = speed.move(x, (x - x0) / floor, done)
    want[:, :, 3] = x0[:, :, 3]
    torch.testing.assert_close(clean.move(x, x0, done), want, atol=1e-6, rtol=1e-6)
    assert torch.equal(clean.move(x, x0, done)[:, :, 3], x0[:, :, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_keep_their_dtype_and_fp32_coefficients(dtype):
    x, predicted = torch.randn(2, 1, 2, 3, 4, 4).to(dtype).unbind()
    for sampler in (DDIM.from_scheduler(ddim()), FlowEuler.from_scheduler(euler())):
        got = sampler.move(x, predicted, [0, 4, 7])
        want = sampler.move(x.float(), predicted.float(), [0, 4, 7])
        assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_what_is_refused():
    with pytest.raises(ValueError, match="clip_sample"):
        DDIM.from_scheduler(ddim(clip_sample=True))
    odd = DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    odd.set_timesteps(7)
    with pytest.raises(ValueError, match="apart"):
        DDIM.from_scheduler(odd)
    for words, build in {
        "prediction": lambda: FlowEuler([1.0, 0.0], "x0"),
        "sigmas must fall": lambda: FlowEuler([1.0, 1.0, 0.0]),
        "one number per timestep": lambda: FlowEuler([1.0, 0.0], timesteps=[1.0, 2.0]),
        "floor": lambda: FlowEuler([1.0, 0.0], floor=1.0),
        r"alphas must lie in \(0, 1\]": lambda: DDIM([900.0], [0.5, 1.5]),
        "finite": lambda: DDIM([900.0], [0.5, float("nan")]),
    }.items():
        with pytest.raises(ValueError, match=words):
            build()
