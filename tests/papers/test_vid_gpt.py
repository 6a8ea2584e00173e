"""ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models (arXiv 2406.10981), and the cache
of its successor Ca2-VDM (arXiv 2411.16375).

Temporal attention is causal over clean frames, whose keys and values are written once and read by all denoise steps of
later chunks; positions are cyclic. The answers are compared with one pass over all frames at once: a timestep per
frame, an explicit mask of what every row may read, written out below in plain torch.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families.latte import latte
from torch import Tensor

import vdit_fast
from vdit_fast.streaming import CausalVideo

FIRST, CHUNK, MAX = 1, 4, 13  # 1, 5, 9 clean frames before a chunk, then the oldest leave
STEPS = (900, 500, 200)
TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}


@pytest.fixture
def model():
    built, inputs = latte(frames=MAX, batch=2)
    return built, {"encoder_hidden_states": inputs["encoder_hidden_states"], "return_dict": False}


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def sampler(model, inputs, seen=None):
    """A few Euler steps towards the prediction; any deterministic sampler would do."""

    def run(latents: Tensor, timestep: int) -> Tensor:
        out = model(latents, timestep=torch.full((latents.shape[0],), timestep), **inputs)[0]
        if seen is not None:
            seen.append(out.clone())
        return out

    def sample(noise: Tensor) -> Tensor:
        for timestep in STEPS:
            noise = noise + 0.3 * run(noise, timestep)
        return noise

    return sample, lambda latents: run(latents, 0)


def at_once(model, inputs, latents: Tensor, timesteps: list[int], reads: Tensor, most: int = MAX) -> Tensor:
    """The prediction for all frames of latents [B, C, F, h, w]: frame i at timesteps[i] and position i mod most, its
    temporal rows reading the frames of ``reads`` bool [F, F]. In fp64, block by block."""
    model = copy.deepcopy(model).double()
    batch, _, frames, height, width = latents.shape
    rows = [model.adaln_single(torch.full((batch,), t), None, batch, torch.float64) for t in timesteps]
    modulation, embedded = (torch.stack(part, 1) for part in zip(*rows, strict=True))  # [B, F, 6 C], [B, F, C]
    text = model.caption_projection(inputs["encoder_hidden_states"].double()).repeat_interleave(frames, 0)
    x = model.pos_embed(latents.double().transpose(1, 2).flatten(0, 1))  # [B F, places, C]
    places = x.shape[1]
    for index, (spatial, block) in enumerate(
        zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    ):
        x = spatial(x, encoder_hidden_states=text, timestep=modulation.flatten(0, 1))
        x = x.unflatten(0, (batch, frames)).transpose(1, 2)  # [B, places, F, C]
        if index == 0:
            x = x + model.temp_pos_embed[0].double()[torch.arange(frames) % most]
        shifts = block.scale_shift_table + modulation.unflatten(2, (6, -1))  # [B, F, 6, C]
        shift, scale, gate, shift2, scale2, gate2 = shifts[:, None].unbind(3)
        y = block.norm1(x) * (1 + scale) + shift
        q, k, v = (
            project(y).unflatten(-1, (block.attn1.heads, -1)).transpose(2, 3)
            for project in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~reads, -torch.inf)
        x = x + gate * block.attn1.to_out[0]((scores.softmax(-1) @ v).transpose(2, 3).flatten(-2))
        x = x + gate2 * block.ff(block.norm2(x) * (1 + scale2) + shift2)
        x = x.transpose(1, 2).flatten(0, 1)
    shift, scale = (model.scale_shift_table[None, None] + embedded[:, :, None]).unbind(2)
    x = model.norm_out(x) * (1 + scale.flatten(0, 1)[:, None]) + shift.flatten(0, 1)[:, None]
    x = model.proj_out(x).view(batch, frames, height // 2, width // 2, 2, 2, -1)
    assert places == height * width // 4
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)


def readable(lengths: list[int], noisy: bool, most: int = MAX) -> Tensor:
    """Which frames the rows of all frames read, the last chunk noisy or clean: every row the frames that were held
    when it was written, a clean row up to itself, a noisy one its whole chunk."""
    total = sum(lengths)
    reads, end = torch.zeros(total, total, dtype=torch.bool), 0
    for length in lengths:
        start, end = end, end + length
        oldest = max(0, end - most)
        for row in range(start, end):
            reads[row, oldest : row + 1] = True
    if noisy:
        reads[start:end, start:end] = True
    return reads


def recompute(model, inputs, first: Tensor, noise: Tensor, most: int = MAX) -> tuple[Tensor, list[Tensor]]:
    """The roll-out without a cache: every step runs all frames since the first."""
    known, lengths, seen, parts = first.double(), [first.shape[2]], [], []
    for part in noise.double().split(CHUNK, dim=2):
        lengths.append(part.shape[2])
        for timestep in STEPS:
            whole = torch.cat((known, part), 2)
            times = [0] * known.shape[2] + [timestep] * part.shape[2]
            reads = readable(lengths, noisy=True, most=most)
            out = at_once(model, inputs, whole, times, reads, most)[:, :, -part.shape[2] :]
            seen.append(out)
            part = part + 0.3 * out
        known = torch.cat((known, part), 2)
        parts.append(part)
    return torch.cat(parts, 2), seen


def test_the_reference_is_the_model(model):
    """Without a mask and with one timestep, the pass over all frames is the stock model."""
    built, inputs = model
    latents = torch.randn(2, 4, MAX, 8, 8)
    want = built(latents, timestep=torch.tensor([700, 700]), **inputs)[0]
    got = at_once(built, inputs, latents, [700] * MAX, torch.ones(MAX, MAX, dtype=torch.bool))
    torch.testing.assert_close(got, want.double(), **TOLERANCE)


@pytest.mark.parametrize("chunks", [3, 7])
def test_cached_equals_recomputed(model, chunks):
    """Three chunks, and seven: the oldest frames leave from the fourth on, and positions wrap around."""
    built, inputs = model
    first, noise = torch.randn(2, 4, FIRST, 8, 8), torch.randn(2, 4, CHUNK * chunks, 8, 8)
    want, predictions = recompute(built, inputs, first, noise)
    handle = vdit_fast.accelerate(built, "exact")
    video, seen = CausalVideo(handle, chunk=CHUNK), []
    sample, write = sampler(built, inputs, seen)
    ids, sizes, begin = [], set(), video.begin

    def noted(frames=None):
        begin(frames)
        ids.append(video.ids)
        sizes.add(video.nbytes)

    video.begin = noted
    got = video.roll_out(sample, write, noise, first)
    steps = [out for i, out in enumerate(seen) if i and i % (len(STEPS) + 1) != 0]  # without the clean passes
    for out, prediction in zip(steps, predictions, strict=True):
        torch.testing.assert_close(out.double(), prediction, **TOLERANCE)
    torch.testing.assert_close(got.double(), want, **TOLERANCE)
    assert [i for chunk in ids for i in chunk] == [i % MAX for i in range(FIRST + CHUNK * chunks)]
    (cache,) = video.caches.values()
    assert sizes == {0, video.nbytes}  # allocated once
    assert video.nbytes == 2 * 2 * (2 * 16) * MAX * 2 * 12 * 4 and len(cache.frames) == min(MAX, FIRST + CHUNK * chunks)
    handle.remove()


def test_fewer_frames_than_the_model_has_positions(model):
    """Positions wrap around where the frames held do, and the last chunk may be shorter."""
    built, inputs = model
    first, noise = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 2 * CHUNK + 3, 8, 8)
    want, _ = recompute(built, inputs, first, noise, most=7)
    with vdit_fast.accelerate(built, "exact") as handle:
        video = CausalVideo(handle, chunk=CHUNK, max_frames=7)
        got = video.roll_out(*sampler(built, inputs), noise[:, :, :CHUNK], first)
        got = torch.cat((got, video.roll_out(*sampler(built, inputs), noise[:, :, CHUNK:])), 2)  # goes on
    torch.testing.assert_close(got.double(), want, **TOLERANCE)


def test_more_frames_than_the_kernel_of_short_sequences_takes():
    built, inputs = latte(frames=70, batch=1, layers=1)
    inputs = {"encoder_hidden_states": inputs["encoder_hidden_states"], "return_dict": False}
    first, noise = torch.randn(1, 4, 66, 8, 8), torch.randn(1, 4, 6, 8, 8)
    want, _ = recompute(built, inputs, first, noise, most=70)
    with vdit_fast.accelerate(built, "exact") as handle:
        got = CausalVideo(handle, chunk=CHUNK).roll_out(*sampler(built, inputs), noise, first)
    torch.testing.assert_close(got.double(), want, **TOLERANCE)


def test_denoise_steps_leave_the_prefix_alone(model):
    built, inputs = model
    handle = vdit_fast.accelerate(built, "exact")
    video = CausalVideo(handle, chunk=CHUNK)
    sample, write = sampler(built, inputs)
    for chunk in range(5):
        video.begin(CHUNK)
        prefix = []
        if chunk:
            (cache,) = video.caches.values()
            rows = [cache._ring.slots[cache.frames.index(f)] for f in cache.frames if f not in cache.chunk]
            prefix = [t[:, rows].clone() for layer in range(2) for t in cache.keys_values(layer)]
            assert len(rows) == min(chunk * CHUNK, MAX - CHUNK)
        latents = sample(torch.randn(2, 4, CHUNK, 8, 8))
        with video.clean():
            write(latents)
        for before, (layer, which) in zip(prefix, [(i, j) for i in range(2) for j in range(2)], strict=False):
            assert torch.equal(cache.keys_values(layer)[which][:, rows], before)
    handle.remove()


def test_ten_times_the_cache_at_constant_memory(model):
    built, inputs = model
    _, write = sampler(built, inputs)
    with vdit_fast.accelerate(built, "exact") as handle:
        video, places = CausalVideo(handle, chunk=CHUNK), set()
        for _ in range(10 * MAX // CHUNK + 1):
            video.begin()
            with video.clean():
                assert write(torch.randn(2, 4, CHUNK, 8, 8)).isfinite().all()
            (cache,) = video.caches.values()
            places.add((video.nbytes, *(t.data_ptr() for layer in range(2) for t in cache.keys_values(layer))))
            assert max(video.ids) < MAX and len(cache.frames) <= MAX
        assert cache.end > 10 * MAX and len(places) == 1


def test_guidance_branches_have_their_own_past(model):
    """Two texts in turn, as split guidance runs them, equal two roll-outs."""
    built, inputs = model
    other = inputs | {"encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}
    noise, want = torch.randn(2, 4, 2 * CHUNK, 8, 8), []
    handle = vdit_fast.accelerate(built, "exact")
    video = CausalVideo(handle, chunk=CHUNK)
    runs = [sampler(built, texts)[1] for texts in (inputs, other)]

    def all_branches(latents, branches):
        return [run(latents) for run in branches]

    for branch in range(2):
        video.reset()
        seen = []
        for part in noise.split(CHUNK, dim=2):
            video.begin()
            with video.clean():
                seen.append(runs[branch](part))
        want.append(seen)
    video.reset()
    for index, part in enumerate(noise.split(CHUNK, dim=2)):
        video.begin()
        with video.clean():
            got = all_branches(part, runs)
        for branch in range(2):
            torch.testing.assert_close(got[branch], want[branch][index], **TOLERANCE)
    assert len(video.caches) == 2
    video.begin()
    built(noise[:, :, :CHUNK], timestep=torch.tensor([300, 300]), **inputs)
    built(noise[:, :, :CHUNK], timestep=torch.tensor([300, 300]), **inputs)
    with pytest.raises(RuntimeError, match=r"guidance branch 2 has no past.*every clean pass"):
        built(noise[:, :, :CHUNK], timestep=torch.tensor([300, 300]), **inputs)
    handle.remove()


def test_a_branch_that_is_left_out_of_the_clean_pass_is_an_error(model):
    """Its pages hold keys of the last noisy step, which the next chunk would read as the prefix."""
    built, inputs = model
    with vdit_fast.accelerate(built, "exact") as handle:
        video, x = CausalVideo(handle, chunk=CHUNK), torch.randn(2, 4, CHUNK, 8, 8)
        run = sampler(built, inputs)[1]
        video.begin()
        for timestep in STEPS[:2]:
            for _ in range(2):
                built(x, timestep=torch.full((2,), timestep), **inputs)
        with video.clean():
            run(x)
        with pytest.raises(RuntimeError, match=r"guidance branch 1 did not run on the clean frames"):
            video.begin()
        with video.clean():
            run(x), run(x)
        built(x, timestep=torch.full((2,), STEPS[2]), **inputs)
        with pytest.raises(RuntimeError, match=r"guidance branch 0 did not run"):  # written, and overwritten
            video.begin()
        with video.clean():
            run(x), run(x)
        video.begin()


def test_the_clean_pass_at_the_timestep_of_the_last_step(model):
    """No other guidance branch: it writes over the keys of the same one."""
    built, inputs = model
    handle = vdit_fast.accelerate(built, "exact")
    video, x = CausalVideo(handle, chunk=CHUNK), torch.randn(2, 4, CHUNK, 8, 8)
    write = sampler(built, inputs)[1]
    video.begin()
    for timestep in (500, 0):
        built(torch.randn_like(x), timestep=torch.full((2,), timestep), **inputs)
    with video.clean():
        want = write(x)
    assert list(video.caches) == [0]
    video.begin()
    got = write(x)
    video.reset()
    video.begin()
    with video.clean():
        assert torch.equal(write(x), want)
    video.begin()
    assert torch.equal(write(x), got)
    handle.remove()


@pytest.mark.parametrize("frames", [1, CHUNK])
def test_the_model_may_be_cast_between_chunks(model, frames):
    built, inputs = model
    handle = vdit_fast.accelerate(built, "exact")
    video = CausalVideo(handle, chunk=CHUNK)
    x = torch.randn(2, 4, frames, 8, 8)
    want = built.temp_pos_embed.bfloat16()
    text = inputs["encoder_hidden_states"]
    for dtype in (torch.float32, torch.bfloat16):
        built.to(dtype)
        video.reset()
        video.begin(frames)
        with video.clean():
            sampler(built, inputs | {"encoder_hidden_states": text.to(dtype)})[1](x.to(dtype))
        assert built.temp_pos_embed.dtype == dtype
    video.close()
    assert torch.equal(built.temp_pos_embed, want)


def test_a_copy_may_stream_too(model):
    built, inputs = model
    noise = torch.randn(2, 4, 2 * CHUNK, 8, 8)
    handle = vdit_fast.accelerate(built, "exact")
    video = CausalVideo(handle, chunk=CHUNK)
    twin = copy.deepcopy(built)
    want = video.roll_out(*sampler(built, inputs), noise)
    own = CausalVideo(vdit_fast.accelerate(twin, "exact"), chunk=CHUNK)
    assert torch.equal(own.roll_out(*sampler(twin, inputs), noise), want)
    handle.remove()
    own.close()


def test_the_model_is_whole_again(model):
    built, inputs = model
    clip = torch.randn(2, 4, MAX, 8, 8)
    run = lambda: built(clip, timestep=torch.tensor([400, 400]), **inputs)[0]  # noqa: E731
    before, table = run(), built.temp_pos_embed
    handle = vdit_fast.accelerate(built, "exact")
    served = run()
    video = CausalVideo(handle, chunk=CHUNK)
    with pytest.raises(ValueError, match="streams with this model already"):
        CausalVideo(handle, chunk=CHUNK)
    with pytest.raises(RuntimeError, match="no frames are begun"):
        run()
    video.begin()
    with pytest.raises(ValueError, match=f"{MAX} frames, but the current chunk has {CHUNK}"):
        run()
    copied = pickle.loads(pickle.dumps(built))
    assert torch.equal(copied(clip, timestep=torch.tensor([400, 400]), **inputs)[0], before)
    copied = copy.deepcopy(built)
    assert torch.equal(copied(clip, timestep=torch.tensor([400, 400]), **inputs)[0], served)
    with pytest.raises(RuntimeError, match="were not written"):
        video.begin()
    video.close()
    assert torch.equal(run(), served)
    video = CausalVideo(handle, chunk=CHUNK)
    video.begin()
    handle.remove()
    assert torch.equal(run(), before) and not video.caches
    hooked = [m for m in built.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooked and built.temp_pos_embed is table


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_transformers(fullgraph):
    built, inputs = latte(frames=MAX, batch=1, layers=1)
    inputs = {"encoder_hidden_states": inputs["encoder_hidden_states"], "return_dict": False}
    noise = torch.randn(1, 4, 2 * CHUNK, 8, 8)
    with vdit_fast.accelerate(built, "exact") as handle:
        video = CausalVideo(handle, chunk=CHUNK)
        torch._dynamo.reset()
        compiled = torch.compile(built, backend="eager", fullgraph=fullgraph)
        if fullgraph:
            with pytest.raises(Exception, match=r"without fullgraph|Observed exception"):
                video.roll_out(*sampler(compiled, inputs), noise)
            return
        want = video.roll_out(*sampler(built, inputs), noise)
        video.reset()
        assert torch.equal(video.roll_out(*sampler(compiled, inputs), noise), want)


def test_what_cannot_be_served(model):
    built, inputs = model
    handle = vdit_fast.accelerate(built, {"cache": {"method": "taylorseer", "granularity": "model"}})
    with pytest.raises(ValueError, match="cache is configured"):
        CausalVideo(handle, chunk=CHUNK)
    handle.reconfigure("exact")
    for options, message in (
        ({"chunk": MAX}, "at least one clean frame"),
        ({"chunk": 2, "max_frames": MAX + 1}, f"has {MAX} temporal positions"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CausalVideo(handle, **options)
    video = CausalVideo(handle, chunk=CHUNK)
    video.begin()
    with pytest.raises(RuntimeError, match="2 of 2 temporal layers ran without"):
        built(torch.randn(2, 4, CHUNK, 8, 8), timestep=torch.tensor([1, 1]), enable_temporal_attentions=False, **inputs)
    handle.remove()
