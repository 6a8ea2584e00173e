"""Clips drawn by an ARSchedule through real models: which frames are seen, at which timestep, and which are written."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import Band

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.streaming import ARDiffusion, ARSchedule, CausalFrames, FlowEuler, FrameModel, causal_frames

STEPS, FRAMES = 4, 5
SIGMAS = torch.linspace(1, 0, STEPS + 1).tolist()
KINDS = ["wan", "skyreels"]


def noise(batch: int = 1, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(batch, 4, frames, 8, 8, generator=torch.Generator().manual_seed(3))


def recorded(model):
    """Copies of the tensor arguments of every forward."""
    calls = []

    def record(module, args, kwargs):
        calls.append({name: x.clone() for name, x in kwargs.items() if isinstance(x, torch.Tensor)})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_is_given(build, kind):
    model, conditions = build(kind)
    calls = recorded(model)
    schedule = ARSchedule(FRAMES, STEPS, 2)
    draw = ARDiffusion(FrameModel(accelerate(model), conditions), schedule, FlowEuler(SIGMAS))
    before = noise()
    for (iteration, clip), number in zip(draw.iterate(noise()), range(len(schedule)), strict=True):
        given = calls[number]
        times = given["timestep"].view(1, FRAMES, -1)
        want = torch.tensor([1000 * (1 - n / STEPS) for n in iteration.done])
        assert torch.allclose(times, want.view(1, -1, 1).expand_as(times)), "finished frames at 0, waiting ones at 1000"
        assert torch.equal(given["hidden_states"], before)
        still = [frame for frame in range(FRAMES) if frame not in iteration.active]
        assert torch.equal(clip[:, :, still], before[:, :, still])
        moved = (clip != before).flatten(3).any(-1).all(1)[0]
        assert moved.tolist() == [frame in iteration.active for frame in range(FRAMES)]
        before = clip.clone()
    assert len(calls) == len(schedule) == STEPS + 2 * (FRAMES - 1)
    assert torch.equal(before, draw(noise())), "the same noise gives the same clip"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_one_iteration_by_hand(build, kind, guidance):
    """Guidance, and the Euler step of the moving frames, against two plain forwards of the stock model."""
    model, conditions = build(kind)
    blank = {"encoder_hidden_states": torch.zeros_like(conditions["encoder_hidden_states"])}
    schedule, x = ARSchedule(3, STEPS, 1), noise(2, 3)
    conditions, blank = ({k: v.expand(2, -1, -1) for k, v in each.items()} for each in (conditions, blank))
    times = torch.tensor([[500.0, 750.0, 1000.0]]).expand(2, -1)
    if kind == "wan":
        extra = {"timestep": times.repeat_interleave(16, dim=1)}
    else:
        extra = {"timestep": times, "enable_diffusion_forcing": True}
    call = {"hidden_states": x, "return_dict": False, **extra}
    given, free = (tiny.run(model, {**call, **each}) for each in (conditions, blank))
    want = x - 0.25 * (given if guidance == 1 else free + guidance * (given - free))
    draw = ARDiffusion(FrameModel(accelerate(model), (conditions, blank), guidance), schedule, FlowEuler(SIGMAS))
    clip = x.clone()
    draw._advance(clip, 2, schedule[2])
    assert schedule[2].done == (2, 1, 0)
    assert draw.model.evaluations == (1 if guidance == 1 else 2)
    torch.testing.assert_close(clip, want, atol=2e-6, rtol=1e-5)


def test_windows_of_a_causal_model_change_nothing(build):
    """SkyReels' own block-causal mask: frames that wait are not read by those before them, so leaving them out changes
    nothing but rounding; nor does reading no finished frames where none are left out."""
    model, conditions = build("skyreels", frame_block=2)
    frame_model = FrameModel(accelerate(model), conditions)
    whole, part = ARSchedule(6, STEPS, 2, block=2), ARSchedule(6, STEPS, 2, block=2, window=6)
    clips = [ARDiffusion(frame_model, schedule, FlowEuler(SIGMAS))(noise(1, 6)) for schedule in (whole, part)]
    assert tiny.relative(clips[1], clips[0]) < 1e-6
    assert [len(i.window) for i in part] == [2, 2, 4, 4, 6, 6, 6, 6]


def test_windows_of_a_model_that_reads_all_differ(build):
    model, conditions = build("wan")
    frame_model = FrameModel(accelerate(model), conditions)
    whole, part = (ARDiffusion(frame_model, ARSchedule(4, STEPS, 2, window=w), FlowEuler(SIGMAS)) for w in (None, 3))
    got, want = part(noise(1, 4)), whole(noise(1, 4))
    assert got.isfinite().all() and tiny.relative(got, want) > 1e-3


def test_steps_are_named_and_windows_begin_generations(build):
    """A planner sees the iteration as its step, also under repeated timesteps; what it remembers of other frames is
    gone when the window moves, and it sees the grid of the window."""
    model, conditions = build("wan", layers=1)
    handle = accelerate(model, Config(attention=Band(width=3)))
    schedule = ARSchedule(4, STEPS, 2, window=3)
    ARDiffusion(FrameModel(handle, conditions), schedule, FlowEuler(SIGMAS))(noise(1, 4))
    stats = handle.stats()
    windows = [iteration.window for iteration in schedule]
    assert stats["generations"] == len(set(windows)) == 4
    state = handle.roots[0].session.state["seen"]
    assert [step for _, step, _, _ in state] == [i for i, w in enumerate(windows) if w == windows[-1]]
    assert stats["layers"][0]["sparse_calls"] == len(schedule) and not stats["layers"][0]["fallbacks"]


def test_caches_serve_one_window_at_a_time(build):
    """The first iteration behind a move of the window computes in full, as the first of a clip does."""
    model, conditions = build("wan")
    handle = accelerate(model, Config.from_dict({"cache": {"method": "taylorseer", "interval": 3, "first_full": 1}}))
    sampler = FlowEuler(torch.linspace(1, 0, 13).tolist())
    schedule = ARSchedule(3, 12, 6, window=2)
    ARDiffusion(FrameModel(handle, conditions), schedule, sampler)(noise(1, 3))
    stats = handle.stats()
    windows = [iteration.window for iteration in schedule]
    moves = [number for number in range(len(windows)) if number == 0 or windows[number] != windows[number - 1]]
    assert stats["generations"] == len(moves) == 3
    assert sum(stats["cache"]["forecast"].values()) > 0
    assert not set(moves) & set(stats["cache"]["forecast"])


def test_every_frame_is_drawn_by_the_frames_before_it_alone(build):
    """Fully autoregressive in a causal model: the noise of later frames never reaches earlier ones."""
    model, conditions = build("wan")
    handle = accelerate(model)
    causal_frames(handle, CausalFrames())
    draw = ARDiffusion(FrameModel(handle, conditions), ARSchedule(3, STEPS, STEPS), FlowEuler(SIGMAS))
    first, second = noise(1, 3), noise(1, 3)
    second[:, :, 2] = 7 * torch.randn_like(second[:, :, 2])
    got, other = draw(first), draw(second)
    assert torch.equal(got[:, :, :2], other[:, :, :2]) and not torch.equal(got[:, :, 2], other[:, :, 2])


def test_what_is_refused(build):
    model, conditions = build("wan")
    handle = accelerate(model)
    frame_model = FrameModel(handle, conditions)
    with pytest.raises(ValueError, match="4 steps, the sampler 2"):
        ARDiffusion(frame_model, ARSchedule(3, STEPS), FlowEuler([1.0, 0.5, 0.0]))
    draw = ARDiffusion(frame_model, ARSchedule(3, STEPS), FlowEuler(SIGMAS))
    with pytest.raises(ValueError, match=r"\[B, C, 3, h, w\]"):
        draw(noise(1, 4))
    with pytest.raises(ValueError, match="pair of conditions"):
        FrameModel(handle, conditions, 2.0)
    with pytest.raises(ValueError, match="'timestep', which the schedule gives"):
        FrameModel(handle, {**conditions, "timestep": 1})
    with pytest.raises(TypeError, match="mapping"):
        FrameModel(handle, (1, 2))
    with pytest.raises(ValueError, match="2 entries for 3 frames"):
        frame_model(noise(1, 3), [1.0, 2.0])
    with pytest.raises(RuntimeError, match="keep its model alive"):
        FrameModel(accelerate(build("wan")[0]), conditions)
    handle.remove()
    with pytest.raises(RuntimeError, match="serves 0 transformers"):
        FrameModel(handle, conditions)


@pytest.mark.parametrize("kind", ["hunyuan_video", "cogvideox_5b", "wan_vace"])
def test_models_with_one_timestep_say_so(kind):
    model, inputs = tiny.build(kind)
    rest = {k: v for k, v in inputs.items() if k not in ("hidden_states", "timestep")}
    draw = ARDiffusion(FrameModel(accelerate(model), rest), ARSchedule(3, STEPS), FlowEuler(SIGMAS))
    with pytest.raises(RuntimeError, match="takes one timestep for all frames"):
        draw(noise(1, 3))
