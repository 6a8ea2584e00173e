"""Rollouts on tiny models of the real classes: what a stream computes is what one block-causal forward computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rollouts import SIZE, Recorded, at_once, chunks_of, clip_of, model_of

from vdit_fast import AttentionPlan, accelerate
from vdit_fast.streaming import SelfForcing, per_frame, teacher_forcing, teacher_forcing_plan


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(
    kind: str, settings: SelfForcing, frames: int, config: dict[str, Any] | None = None, batch: int = 1, **kw: Any
) -> None:
    model, rest = model_of(kind)
    rest = {name: value.repeat(batch, 1, 1) for name, value in rest.items()}
    handle = accelerate(model, config or {})
    run = Recorded(handle, settings, rest, frames, **kw)
    passes = len(settings.timesteps) + 1
    chunks = -(-frames // settings.chunk_frames)
    assert len(run.inputs) == passes * chunks - 1  # the last chunk's keys are not asked for
    for step, sigma in enumerate(settings.sigmas):
        rows = range(step, len(run.inputs), passes)
        assert all(run.timesteps[i] == pytest.approx(1000 * sigma) for i in rows)
        noisy, want = (torch.cat([x[i] for i in rows], 2) for x in (run.inputs, run.outputs))
        got = at_once(handle, run.clip, noisy, 1000 * sigma, settings, rest)
        assert distance(got, want) < 2e-6
        # and the test can tell: each chunk without its past is another thing
        alone = SelfForcing(chunk_frames=settings.chunk_frames, cache_frames=settings.chunk_frames)
        past = at_once(handle, run.clip, noisy, 1000 * sigma, alone, rest)
        assert distance(past[:, :, settings.chunk_frames :], want[:, :, settings.chunk_frames :]) > 0.02


@pytest.mark.parametrize("kind", ["wan_t2v", "wan_i2v", "skyreels", "skyreels_ar"])
@pytest.mark.parametrize(
    "settings",
    [
        SelfForcing(chunk_frames=3, cache_frames=12),
        SelfForcing(chunk_frames=3, cache_frames=7, sinks=2, context_noise=20.0),
        SelfForcing(chunk_frames=3, cache_frames=6, store="pre_rope"),
    ],
    ids=["everything held", "sinks and window", "pre_rope"],
)
def test_a_rollout_is_the_block_causal_forward(kind: str, settings: SelfForcing) -> None:
    check(kind, settings, 12)


@pytest.mark.parametrize("fuse", ["fast", "eager", "off"])
@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_frame_by_frame_with_and_without_fused_operators(fuse: str, store: str) -> None:
    """One pass appends and rotates, or the model's own modules do and the cache copies."""
    settings = SelfForcing(chunk_frames=1, cache_frames=4, timesteps=(1000, 400), store=store)
    check("wan_t2v", settings, 7, {"fuse": fuse}, batch=2)


def test_a_last_chunk_may_be_shorter() -> None:
    check("wan_t2v", SelfForcing(cache_frames=9, timesteps=(900.0, 500.0)), 8)


def test_relative_positions_with_sinks_are_those_of_the_frames_held() -> None:
    """Once frames have left, sinks are nearer than their numbers say: what one forward over the frames held, numbered
    from 0, computes for the newest chunk."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    settings = SelfForcing(chunk_frames=1, cache_frames=3, sinks=1, store="pre_rope", timesteps=(700,), shift=1)
    run = Recorded(handle, settings, rest, 6)
    rows: list[torch.Tensor] = []

    def note(step: Any, place: Any, found: Any) -> None:
        rows.append(found.video.clone())

    with handle.hook("attention_heads", note, layers=0):
        clip_of(handle, settings, rest, 6)
        streamed = rows[-1]  # the last forward denoises frame 5 behind frames 0 and 4
        rows.clear()
        held = torch.cat([run.clip[:, :, [0, 4]], run.inputs[-1]], 2)
        at_once(handle, held, held, 700.0, SelfForcing(chunk_frames=1, cache_frames=3), rest)
    # layer 0 sees embedded frames and timesteps only, so that the three frames stand for themselves
    assert distance(rows[0][:, -16:], streamed) < 2e-6


def test_guidance_has_a_cache_for_each_branch() -> None:
    model, rest = model_of("wan_t2v")
    free = torch.randn(1, 7, 16)
    settings = SelfForcing(cache_frames=6, guidance=3.0, timesteps=(1000, 500))
    got = clip_of(model, settings, rest, 9, negative_prompt_embeds=free)
    handle = accelerate(model)
    one = SelfForcing(cache_frames=6, timesteps=(1000, 500))
    run = Recorded(handle, settings, rest, 9, negative_prompt_embeds=free)
    assert torch.equal(run.clip, got) and not torch.allclose(clip_of(handle, one, rest, 9), got, atol=0.05)
    # every branch is the rollout of its own prompt over the common clip
    for branch, text in enumerate((rest["encoder_hidden_states"], free)):
        rows = range(2 + branch, len(run.inputs), 6)  # second step of [2 steps, write] x 2 branches
        noisy, want = (torch.cat([x[i] for i in rows], 2) for x in (run.inputs, run.outputs))
        given = at_once(handle, run.clip, noisy, 1000 * settings.sigmas[1], settings, {"encoder_hidden_states": text})
        assert distance(given, want) < 2e-6
    with pytest.raises(ValueError, match="negative_prompt_embeds is None"):
        chunks_of(model, settings, rest, 9)
    with pytest.raises(ValueError, match="one batch size"):
        chunks_of(model, settings, rest, 9, negative_prompt_embeds=free.repeat(2, 1, 1))


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_sampler(prediction: str) -> None:
    """x0 = x - sigma v, noised again to the next level with new noise; the noise comes from the generator in order."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    settings = SelfForcing(cache_frames=3, prediction=prediction, shift=3.0, timesteps=(1000, 600, 300))
    run = Recorded(handle, settings, rest, 3)
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 3, *SIZE, generator=noise)
    for step, t in enumerate((1000, 600, 300)):
        sigma = 3 * (t / 1000) / (1 + 2 * (t / 1000))
        torch.testing.assert_close(run.inputs[step], x, atol=1e-5, rtol=1e-5)
        clean = run.outputs[step] if prediction == "x0" else run.inputs[step] - sigma * run.outputs[step]
        if step < 2:
            after = settings.sigmas[step + 1]
            x = (1 - after) * clean + after * torch.randn(x.shape, generator=noise)
    torch.testing.assert_close(run.clip, clean)


@pytest.mark.parametrize(("given", "cache"), [(9, 9), (9, 15), (12, 6), (3, 6)])
@pytest.mark.parametrize("store", ["post_rope", "pre_rope"])
def test_a_clip_that_is_given_is_as_if_it_had_been_made(given: int, cache: int, store: str) -> None:
    """In one block-causal forward where the cache holds it; the chunk after it is the one that followed."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    settings = SelfForcing(cache_frames=cache, store=store, timesteps=(1000, 500))
    noise = torch.Generator().manual_seed(5)
    parts, states = [], []
    for chunk in chunks_of(handle, settings, rest, given + 3, generator=noise):
        parts.append(chunk.latents)
        states.append(noise.get_state())
    noise.set_state(states[-2])
    before = handle.stats()["streaming"]["write"]
    initial = torch.cat(parts[:-1], 2)
    (chunk,) = chunks_of(handle, settings, rest, 3, generator=noise, initial_latents=initial)
    assert chunk.index == 0 and chunk.first_frame == given
    assert distance(chunk.latents, parts[-1]) < 2e-6
    assert handle.stats()["streaming"]["write"] - before == (1 if given <= cache else 1 + (given - cache) // 3)


def test_an_image_before_chunks_of_three() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    settings = SelfForcing(cache_frames=8, timesteps=(1000, 500))
    noise, image = torch.Generator().manual_seed(5), torch.randn(1, 4, 1, *SIZE)
    stream = chunks_of(handle, settings, rest, 6, generator=noise, initial_latents=image)
    first = next(stream)
    state = noise.get_state()
    second = next(stream)
    assert (first.first_frame, second.first_frame) == (1, 4)
    noise.set_state(state)
    four = torch.cat([image, first.latents], 2)
    (again,) = chunks_of(handle, settings, rest, 3, generator=noise, initial_latents=four)
    assert distance(again.latents, second.latents) < 2e-6


def test_sixteen_bits() -> None:
    """A bf16 model streams into bf16 caches; as far from the fp32 rollout as rounding goes."""
    model, rest = model_of("wan_t2v")
    settings = SelfForcing(cache_frames=6, timesteps=(1000,), store="pre_rope")
    want = clip_of(model, settings, rest, 9)
    half = copy.deepcopy(model).to(torch.bfloat16)
    rest = {name: value.bfloat16() for name, value in rest.items()}
    for store in ("pre_rope", "post_rope"):
        got = clip_of(half, SelfForcing(cache_frames=6, timesteps=(1000,), store=store), rest, 9)
        assert got.dtype == torch.float32 and distance(got, want) < 0.05


@pytest.mark.parametrize(
    ("frames", "tokens", "chunk", "cache", "sinks"), [(7, 5, 3, None, 0), (8, 3, 2, 5, 2), (1, 1, 1, 1, 0)]
)
def test_teacher_forcing_plan(frames: int, tokens: int, chunk: int, cache: int | None, sinks: int) -> None:
    """Row by row against the rule: a rolling cache that evicts the oldest frames that are no sinks."""
    plan = teacher_forcing_plan(frames, tokens, chunk_frames=chunk, cache_frames=cache, sinks=sinks).validate()
    want = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    held: list[int] = []
    for start in range(0, frames, chunk):
        new = list(range(start, min(start + chunk, frames)))
        held += new
        while cache is not None and len(held) > cache:
            held.remove(next(frame for frame in held if frame >= sinks))
        for row in new:
            want[row, held] = True
            want[frames + row, [frame for frame in held if frame < start]] = True
            want[frames + row, [frames + frame for frame in new]] = True
    assert torch.equal(plan.to_mask()[0, 0], want.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1))
    assert isinstance(plan, AttentionPlan)


def forced(handle: Any, rest: dict[str, Any], clean: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """The outputs for noisy frames at 700 behind clean ones."""
    (model,) = handle.modules
    both = torch.cat([clean, noisy], 2)
    timesteps = torch.tensor([0.0, 700.0]).repeat_interleave(clean.shape[2])[None]
    out = model(hidden_states=both, **rest, **per_frame(handle, timesteps, both), return_dict=False)[0]
    return out[:, :, clean.shape[2] :]


def test_gradients_of_teacher_forcing_reach_the_frames_before_a_chunk() -> None:
    """And no others; they are the same with gradient checkpointing, which outside would be of other positions."""
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    clean, noisy = torch.randn(2, 1, 4, 6, *SIZE)
    clean.requires_grad_()
    with teacher_forcing(handle, chunk_frames=2):
        out = forced(handle, rest, clean, noisy)
    (grad,) = torch.autograd.grad(out[:, :, 2:4].square().sum(), clean)
    assert (grad.abs().amax((0, 1, 3, 4)) > 0).tolist() == [True, True, False, False, False, False]
    model.enable_gradient_checkpointing()
    model.train()
    with teacher_forcing(handle, chunk_frames=2):
        out = forced(handle, rest, clean, noisy)
        (again,) = torch.autograd.grad(out[:, :, 2:4].square().sum(), clean)
        torch.testing.assert_close(again, grad, atol=1e-5, rtol=1e-4)
        out = forced(handle, rest, clean, noisy)
    with pytest.raises(RuntimeError, match="checkpoint"):
        torch.autograd.grad(out[:, :, 2:4].square().sum(), clean)


def test_teacher_forcing_after_a_forward_in_inference_mode() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    clean, noisy = torch.randn(2, 1, 4, 4, *SIZE)
    with teacher_forcing(handle, chunk_frames=2):
        with torch.inference_mode():
            want = forced(handle, rest, clean, noisy)
        out = forced(handle, rest, clean, noisy.requires_grad_())
        torch.testing.assert_close(out, want.clone(), atol=1e-5, rtol=1e-5)
        out.square().sum().backward()
    assert noisy.grad is not None and noisy.grad.isfinite().all()


def test_what_teacher_forcing_refuses() -> None:
    model, rest = model_of("wan_t2v")
    handle = accelerate(model)
    x = torch.randn(1, 4, 2, *SIZE)
    with teacher_forcing(handle, chunk_frames=1), pytest.raises(ValueError, match="got 3 frames"):
        model(hidden_states=torch.randn(1, 4, 3, *SIZE), timestep=torch.tensor([700.0]), **rest)
    with pytest.raises(ValueError, match="a chunk of 3 and 2 sinks must fit"):
        teacher_forcing(handle, chunk_frames=3, cache_frames=4, sinks=2).__enter__()
    with teacher_forcing(handle, chunk_frames=1):
        with pytest.raises(RuntimeError, match="exchanged by something else"):
            teacher_forcing(handle, chunk_frames=1).__enter__()
        with pytest.raises(RuntimeError, match="exchanged by something else"):
            next(chunks_of(handle, SelfForcing(), rest, 3))
    session = handle.roots[0].session
    assert not session.around_heads and session.positions is None
    with torch.no_grad():
        forced(handle, rest, x, x)
