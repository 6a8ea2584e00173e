"""Finished frames whose keys and values are kept: the clip of causal attention over the whole clip, at less work."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import Band

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.streaming import ARDiffusion, ARSchedule, CausalFrames, FlowEuler, FrameModel, causal_frames
from vdit_fast.streaming.kept_frames import live_plan

STEPS = 4
SAMPLER = FlowEuler(torch.linspace(1, 0, STEPS + 1).tolist())


def noise(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, frames, 8, 8, generator=torch.Generator().manual_seed(1))


def pair(conditions):
    return conditions, {"encoder_hidden_states": torch.zeros_like(conditions["encoder_hidden_states"])}


@pytest.mark.parametrize(("kept", "live"), [(0, [3, 4, 2]), (5, [2, 2]), (1, [6])])
def test_live_plan(kept, live):
    plan = live_plan(kept, live).validate()
    row = [-1] * kept + [i for i, n in enumerate(live) for _ in range(n)]
    want = torch.tensor([[a >= b for b in row[kept:]] for a in row])
    assert torch.equal(plan.to_mask()[0, 0], want)
    q, k, v = torch.randn(1, len(row), 2, 16), *torch.randn(2, 1, sum(live), 2, 16).unbind()
    extra = torch.randn(1, 7, 2, 16), torch.randn(1, 7, 2, 16)
    got = vdit_fast.attention(q, k, v, plan, segments=[extra])
    mask = torch.cat((want, torch.ones(len(row), 7, dtype=torch.bool)), dim=1)
    keys, values = (torch.cat(both, dim=1) for both in ((k, extra[0]), (v, extra[1])))
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, keys) / 4).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(got, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("ar_step", [0, 1, 3, STEPS])
@pytest.mark.parametrize(("frames", "block"), [(5, 1), (6, 2), (5, 2)])
def test_the_clip_is_that_of_causal_attention(build, frames, block, ar_step):
    """With guidance, whose branches keep keys of their own; the last block may be shorter."""
    model, conditions = build("wan")
    handle = accelerate(model)
    frame_model = FrameModel(handle, pair(conditions), 3.0)
    schedule = ARSchedule(frames, STEPS, ar_step, block)
    remove = causal_frames(handle, CausalFrames(block))
    want = ARDiffusion(frame_model, schedule, SAMPLER)(noise(frames))
    remove()
    draw = ARDiffusion(frame_model, schedule, SAMPLER, keep=True)
    for _ in range(2):  # a second clip begins anew
        assert tiny.relative(draw(noise(frames)), want) < 2e-6
    if ar_step:
        assert draw.kept.kept == frames - (frames - 1) % block - 1, "all but the last block"
        page = 16 * 2 * 16 * 4  # tokens, heads, channels, bytes
        assert draw.kept.nbytes == 2 * 2 * 2 * frames * page  # branches, layers, keys and values
    assert "streaming" not in handle.roots[0].session.around_heads


@pytest.mark.parametrize("kernel", [True, False])
def test_a_model_that_is_causal_by_its_configuration(build, kernel, monkeypatch):
    """Where there is no kernel, attention is dense over mask and plan: the model's own mask, of all rows and keys, must
    be gone."""
    model, conditions = build("skyreels", frame_block=2)
    if not kernel:
        monkeypatch.setattr("vdit_fast.models.session.missing_kernel", lambda q, short=False: "no kernel in this test")
    frame_model = FrameModel(accelerate(model), conditions)
    schedule = ARSchedule(6, STEPS, 2, block=2)
    want = ARDiffusion(frame_model, schedule, SAMPLER)(noise(6))
    got = ARDiffusion(frame_model, schedule, SAMPLER, keep=True)(noise(6))
    assert tiny.relative(got, want) < 2e-6


def test_its_plan_is_no_inference_tensor(build):
    model, conditions = build("wan")
    draw = ARDiffusion(FrameModel(accelerate(model), conditions), ARSchedule(3, STEPS, 2), SAMPLER, keep=True)
    with torch.inference_mode():
        draw(noise(3))
    (plan,) = draw.kept._plans.values()
    assert not plan.tiles.is_inference()


def test_finished_frames_run_once_more_and_never_again(build):
    model, conditions = build("wan")
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].view(-1, 16)[:, 0].tolist()), with_kwargs=True
    )
    draw = ARDiffusion(FrameModel(accelerate(model), conditions), ARSchedule(4, 4, 2), SAMPLER, keep=True)
    draw(noise(4))
    assert seen == [
        [1000], [750], [500, 1000], [250, 750],
        [0, 500, 1000], [250, 750], [0, 500, 1000], [250, 750],
        [0, 500], [250],
    ]  # fmt: skip


def test_text_is_remembered_beside_it_and_planners_are_not_asked(build):
    model, conditions = build("wan")
    handle = accelerate(model, Config(attention=Band(width=2), text_kv=True))
    schedule = ARSchedule(3, STEPS, 2)
    ARDiffusion(FrameModel(handle, conditions), schedule, SAMPLER, keep=True)(noise(3))
    stats = handle.stats()
    assert stats["layers"][0]["unasked"] == {"kept frames: every finished frame is read": len(schedule)}
    assert stats["text_kv"]["computed"] == 2 and stats["text_kv"]["reused"] == 2 * (len(schedule) - 1)


def test_compiled_blocks(build):
    torch._dynamo.reset()
    model, conditions = build("wan", layers=1)
    draw = ARDiffusion(FrameModel(accelerate(model), conditions), ARSchedule(3, STEPS, 2), SAMPLER, keep=True)
    want = draw(noise(3))
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert tiny.relative(draw(noise(3)), want) < 1e-5
    torch._dynamo.reset()


def test_what_is_refused(build):
    model, conditions = build("wan")
    handle = accelerate(model)
    frame_model = FrameModel(handle, conditions)
    with pytest.raises(ValueError, match="window of 3"):
        ARDiffusion(frame_model, ARSchedule(3, STEPS, 2, window=3), SAMPLER, keep=True)
    draw = ARDiffusion(frame_model, ARSchedule(3, STEPS, 2), SAMPLER, keep=True)
    remove = causal_frames(handle)
    with pytest.raises(RuntimeError, match="bring their own order"):
        draw(noise(3))
    remove()
    long = ARDiffusion(frame_model, ARSchedule(65, 1, 1), FlowEuler([1.0, 0.0]), keep=True)
    with pytest.raises(ValueError, match="64"):  # the model's table of positions
        long(noise(65))
    handle.reconfigure(Config.from_dict({"cache": "taylorseer"}))
    with pytest.raises(RuntimeError, match="set cache and subset to null"):
        ARDiffusion(frame_model, ARSchedule(3, STEPS, 2), SAMPLER, keep=True)


@pytest.mark.parametrize(("kind", "why"), [("cogvideox_5b", "text's keys change"), ("wan_vace", "control")])
def test_models_whose_keys_change_with_the_video(kind, why):
    model, inputs = tiny.build(kind)
    frame_model = FrameModel(accelerate(model), {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    with pytest.raises(NotImplementedError, match=why):
        ARDiffusion(frame_model, ARSchedule(3, STEPS, 2), SAMPLER, keep=True)
