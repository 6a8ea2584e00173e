"""AR-Diffusion: Asynchronous Video Generation with Auto-Regressive Diffusion (arXiv 2503.07418): row 42, checks A1, S1.

Temporal-causal attention behind leading context rows, a timestep per frame that never falls along the clip, and the AD
scheduler. The released configuration lets context rows read the video, so their keys and values cannot be kept.
"""

from __future__ import annotations

import itertools
import math

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.streaming import DDIM, ARDiffusion, ARSchedule, CausalFrames, FoPP, FrameModel, causal_frames


def sampler(steps: int) -> tuple[DDIMScheduler, DDIM]:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")  # the paper's models predict x0
    scheduler.set_timesteps(steps)
    return scheduler, DDIM.from_scheduler(scheduler)


@pytest.mark.parametrize("kind", ["wan", "skyreels"])
def test_ar_step_0_is_plain_ddim(kind: str) -> None:
    """Bit for bit what diffusers' DDIM makes of the same model, all frames at the same step; and within rounding what
    the stock model makes with one timestep for the clip."""
    from families.skyreels_v2 import skyreels

    model, inputs = tiny.wan() if kind == "wan" else skyreels()
    noise = torch.randn(1, 4, 4, 8, 8)
    scheduler, ddim = sampler(10)
    stock = x = noise
    for t in scheduler.timesteps:
        predicted = tiny.run(model, {**inputs, "hidden_states": stock, "timestep": t.view(1)})
        stock = scheduler.step(predicted, t, stock).prev_sample
    frame_model = FrameModel(accelerate(model), {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    for t in scheduler.timesteps:
        x = scheduler.step(frame_model(x, [float(t)] * 4), t, x).prev_sample
    got = ARDiffusion(frame_model, ARSchedule(4, 10, ar_step=0), ddim)(noise)
    assert torch.equal(got, x)
    assert tiny.relative(got, stock) < 1e-5
    later = ARDiffusion(frame_model, ARSchedule(4, 10, ar_step=5), ddim)(noise)
    assert tiny.relative(later, got) > 1e-3


def test_iterations() -> None:
    """50 + 15 ar_step for 16 frames of 50 steps, from synchronous to one frame after the other."""
    for ar_step in range(51):
        schedule = ARSchedule(16, 50, ar_step)
        assert len(list(schedule)) == len(schedule) == 50 + 15 * ar_step
    for iteration in schedule:
        assert all(earlier >= later for earlier, later in itertools.pairwise(iteration.done))


def test_a1_timestep_vectors_for_training() -> None:
    fopp = FoPP(6, 4)
    assert fopp.total == math.comb(9, 4) == 126
    for t, f in itertools.product(range(5), range(3)):
        assert fopp.behind[t][f] == fopp.behind[t + 1][f] + fopp.behind[t][f + 1]
    drawn = fopp.sample(500, uniform=True)
    assert bool((drawn.diff(dim=1) >= 0).all()) and len(set(map(tuple, drawn.tolist()))) > 110


@pytest.mark.parametrize("block", [1, 3])
def test_s1_the_mask_is_the_roll_out(block: int) -> None:
    """6 frames of 32 tokens behind 77 context rows. Frames rolled out block by block over the keys so far give what the
    mask gives at once."""
    context, tokens, frames = 77, 32, 6
    layout = CausalFrames(block)
    plan = layout.plan((frames, 1, tokens), context)
    q, k, v = torch.randn(3, 1, context + frames * tokens, 2, 32).unbind()
    at_once = vdit_fast.attention(q, k, v, plan)
    parts = [vdit_fast.attention(q[:, :context], k, v)]
    for first in range(0, frames, block):
        start, end = (context + frame * tokens for frame in (first, first + block))
        parts.append(vdit_fast.attention(q[:, start:end], k[:, :end], v[:, :end]))
    torch.testing.assert_close(at_once, torch.cat(parts, dim=1), atol=2e-6, rtol=1e-5)


def test_context_that_reads_the_video_cannot_be_kept() -> None:
    """CogVideoX has its text in front, as AR-Diffusion has its context. As released, the keys of context rows change
    with the video from the second layer on; only where context reads context do they stay."""
    assert not CausalFrames().context_cacheable and CausalFrames(context_reads="context").context_cacheable
    model, inputs = tiny.build("cogvideox_5b")
    text = inputs["encoder_hidden_states"].shape[1]
    handle = accelerate(model)
    for reads in ("all", "context"):
        remove = causal_frames(handle, CausalFrames(context_reads=reads))
        kept = []
        hook = handle.hook("attention_input", lambda step, place, rows, kept=kept: kept.append(rows.context.clone()))
        for _ in range(2):
            tiny.run(model, {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])})
        first, second = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
        assert all(x.shape[1] == text for x in kept) and len(same) > 1
        assert same == ([True] * len(same) if reads == "context" else [True] + [False] * (len(same) - 1))
        hook()
        remove()


@pytest.mark.parametrize("block", [1, 3])
def test_s1_finished_frames_live_in_a_cache(block: int) -> None:
    """In a real model without context in its sequence: keys and values of finished frames are kept, and the clip is
    that of the mask over the whole clip at every iteration. Where text is in the sequence, it is refused."""
    model, inputs = tiny.wan()
    handle = accelerate(model)
    frame_model = FrameModel(handle, {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    _, ddim = sampler(5)
    schedule, noise = ARSchedule(6, 5, 2, block), torch.randn(1, 4, 6, 8, 8)
    remove = causal_frames(handle, CausalFrames(block))
    want = ARDiffusion(frame_model, schedule, ddim)(noise)
    remove()
    kept = ARDiffusion(frame_model, schedule, ddim, keep=True)
    assert tiny.relative(kept(noise), want) < 1e-5
    assert kept.kept is not None and kept.kept.kept == 6 - block
    model, inputs = tiny.build("cogvideox_5b")
    text = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    with pytest.raises(NotImplementedError, match="text's keys change"):
        ARDiffusion(FrameModel(accelerate(model), text), schedule, ddim, keep=True)


@pytest.mark.parametrize("block", [1, 2])
def test_a_frame_is_drawn_from_the_frames_before_it(block: int) -> None:
    """In a real model: the first frames of a clip are those of a shorter clip, whatever comes behind them."""
    model, inputs = tiny.wan()
    handle = accelerate(model)
    causal_frames(handle, CausalFrames(block))
    frame_model = FrameModel(handle, {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    _, ddim = sampler(5)
    noise = torch.randn(1, 4, 4, 8, 8)
    long, short = (ARDiffusion(frame_model, ARSchedule(n, 5, 3, block), ddim)(noise[:, :, :n]) for n in (4, 2))
    assert tiny.relative(long[:, :, :2], short) < 1e-5
