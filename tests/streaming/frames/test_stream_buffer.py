"""The moving buffer: which noise level each frame has, what leaves, what enters, and that real models run it."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.planners import ShiftedWindow
from vdit_fast.streaming import (
    ARDiffusion,
    ARSchedule,
    BufferSchedule,
    CausalFrames,
    FlowEuler,
    FrameModel,
    StreamBuffer,
    causal_frames,
)

SHAPE = (1, 4, 8, 8)


def euler(steps: int) -> FlowEuler:
    return FlowEuler(torch.linspace(1, 0, steps + 1).tolist())


def buffer(build, schedule, *, seed=0, kind="wan", config="exact", **options):
    model, conditions = build(kind)
    handle = accelerate(model, config)
    return handle, StreamBuffer(
        FrameModel(handle, conditions), schedule, euler(schedule.steps), SHAPE,
        generator=torch.Generator().manual_seed(seed), **options,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_every_chunk_takes_its_own_steps(chunks, chunk, micro_steps):
    """Chunk i of the stream has max(0, m - s i) steps behind it before evaluation m, and leaves at T."""
    schedule = BufferSchedule(chunks, chunk, micro_steps)
    total = schedule.steps
    for m in range(3 * total + 2):
        left = sum(m - micro_steps * i >= total for i in range(4 * chunks))
        assert schedule.left(m) == left
        want = [max(0, m - micro_steps * (left + j)) for j in range(chunks)]
        assert schedule.done(m) == tuple(n for n in want for _ in range(chunk))
        assert max(want) < total and all(a >= b for a, b in itertools.pairwise(want))
        if m >= total - micro_steps:  # settled: every chunk is s steps behind the one before it
            assert all(a - b == micro_steps for a, b in itertools.pairwise(want))


@pytest.mark.parametrize("kind", ["wan", "skyreels"])
def test_a_step_of_the_buffer(build, kind):
    """Timesteps rise along the buffer; the chunk that leaves is the head as the sampler left it; what stays only moves
    up; noise enters; reference frames are the last that have left and are shown clean."""
    schedule = BufferSchedule(chunks=3, chunk=2, micro_steps=2, reference=1)
    clean = torch.randn(1, 4, 1, 8, 8)
    handle, stream = buffer(build, schedule, kind=kind, reference=clean)
    moved = {}
    real = stream.sampler.move
    stream.sampler.move = lambda x, prediction, done: moved.setdefault("out", real(x, prediction, done))
    given = []
    handle.modules[0].register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    last, left = clean, 0
    for number in range(12):
        before, times = stream.latents.clone(), stream.timesteps
        assert len(times) == schedule.frames == 7 and times[0] == 0
        assert all(a <= b for a, b in itertools.pairwise(times))
        assert torch.equal(before[:, :, :1], last)
        moved.clear()
        chunk = stream.advance()
        sent = given[-1]["timestep"].view(1, 7, -1)[0, :, 0]
        assert torch.allclose(sent, torch.tensor(times))
        out = moved["out"]
        after = torch.cat((before[:, :, :1], out, before[:, :, 1 + out.shape[2] :]), dim=2)
        assert out.shape[2] == 2 * min(number // 2 + 1, 3), "chunks that wait are not written"
        if number < 5 or number % 2 == 0:
            assert chunk is None and torch.equal(stream.latents, after)
            continue
        left += 1
        assert torch.equal(chunk, after[:, :, 1:3])
        assert torch.equal(stream.latents[:, :, 1:5], after[:, :, 3:]), "the rows that stay are those before the shift"
        last = chunk[:, :, 1:]
        assert not torch.isin(stream.latents[:, :, 5:], before).any(), "fresh noise"
    assert left == 4 and schedule.left(12) == 4


def test_reference_frames_longer_than_a_chunk(build):
    schedule = BufferSchedule(chunks=2, chunk=1, micro_steps=1, reference=3)
    clean = torch.randn(1, 4, 3, 8, 8)
    _, stream = buffer(build, schedule, reference=clean)
    kept = torch.cat([clean, *itertools.islice(stream.stream(), 4)], dim=2)
    assert torch.equal(stream.latents[:, :, :3], kept[:, :, -3:])


def plain(build, kind, noise, steps):
    """Ordinary sampling: every frame at the same step."""
    model, conditions = build(kind)
    frame_model, sampler = FrameModel(accelerate(model), conditions), euler(steps)
    for n, t in enumerate(sampler.timesteps):
        count = noise.shape[2]
        noise = sampler.move(noise, frame_model(noise, [t] * count, step=n, num_steps=steps), [n] * count)
    return noise


@pytest.mark.parametrize("kind", ["wan", "skyreels"])
@pytest.mark.parametrize("steps", [1, 4])
def test_one_chunk_is_ordinary_sampling(build, kind, steps):
    """c = B, bit for bit; with s = 1 in one evaluation."""
    _, stream = buffer(build, BufferSchedule(chunks=1, chunk=3, micro_steps=steps), kind=kind)
    for _ in range(2):
        noise = stream.latents.clone()
        chunk = next(stream.stream())
        assert torch.equal(chunk, plain(build, kind, noise, steps))


@pytest.mark.parametrize(("chunks", "chunk", "micro_steps"), [(3, 1, 1), (2, 2, 2), (4, 1, 2)])
def test_a_causal_model_draws_what_ar_diffusion_draws(build, chunks, chunk, micro_steps):
    """Chunks behind each other by s steps are AR-Diffusion's blocks with ar_step = s in a window of the buffer's size:
    where no frame reads a later one, the noise that waits in the buffer makes no difference. Until the last of 2 N
    blocks begins, behind which a stream has more and a clip has none, N + 1 chunks have left."""
    schedule = BufferSchedule(chunks, chunk, micro_steps)
    handle, stream = buffer(build, schedule)
    causal_frames(handle, CausalFrames(block=chunk))
    noise, real = [stream.latents.clone()], stream.noise
    stream.noise = lambda: noise.append(real()) or noise[-1]
    got = torch.cat(list(itertools.islice(stream.stream(), chunks + 1)), dim=2)
    drawn = torch.cat(noise, dim=2)[:, :, : 2 * chunks * chunk]
    ar = ARSchedule(drawn.shape[2], schedule.steps, micro_steps, block=chunk, window=chunks * chunk)
    want = ARDiffusion(stream.model, ar, euler(schedule.steps))(drawn)[:, :, : got.shape[2]]
    assert tiny.relative(got, want) < 1e-5


def test_ten_buffers_long_at_constant_memory(build):
    """Ten times the buffer's length with shifted windows: finite, the same sizes throughout, a chunk per s steps."""
    schedule = BufferSchedule(chunks=2, chunk=1, micro_steps=1)
    handle, stream = buffer(build, schedule, config=Config(attention=ShiftedWindow(window=(1, 2, 2))))
    session = handle.roots[0].session
    sizes = []
    for chunk in itertools.islice(stream.stream(), 20):
        assert chunk.shape == (1, 4, 1, 8, 8) and chunk.isfinite().all()
        sizes.append((stream.latents.shape, len(session.static), len(session.state)))
    assert len(set(sizes)) == 1 and stream.evaluations == 2 + 19
    assert handle.stats()["layers"][0]["sparse_calls"] == 21


def test_the_same_seed_gives_the_same_stream(build):
    schedule = BufferSchedule(chunks=2, chunk=2, micro_steps=1)
    first, second = ([*itertools.islice(buffer(build, schedule, seed=4)[1].stream(), 3)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = next(buffer(build, schedule, seed=5)[1].stream())
    assert not torch.equal(other, first[0])


def test_what_is_refused(build):
    model, conditions = build("wan")
    frame_model = FrameModel(accelerate(model), conditions)
    schedule = BufferSchedule(2, reference=1)
    with pytest.raises(ValueError, match=r"2 steps \(micro_steps 1 \* chunks 2\), the sampler 3"):
        StreamBuffer(frame_model, schedule, euler(3), SHAPE)
    for reference in (None, torch.zeros(1, 4, 2, 8, 8)):
        with pytest.raises(ValueError, match="reference must be the clean latents"):
            StreamBuffer(frame_model, schedule, euler(2), SHAPE, reference=reference)
    with pytest.raises(ValueError, match="shape must be"):
        StreamBuffer(frame_model, BufferSchedule(2), euler(2), (4, 8, 8))
    for bad in ({"chunks": 0}, {"chunk": 0}, {"micro_steps": 0}, {"reference": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BufferSchedule(**{"chunks": 2} | bad)
