"""What the ranks of ``test_frames_ranks.py`` run: frame schedules and regions alone and with a shared sequence."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from ulysses_cases import built

from vdit_fast.accelerate import accelerate
from vdit_fast.parallel import sequence_parallel
from vdit_fast.regions import Regions
from vdit_fast.streaming import ARDiffusion, ARSchedule, FlowEuler, FrameModel, causal_frames

BOXES = [(0, 0, 3, 3), (1, 2, 4, 6), (2, 4, 5, 7), (1, 1, 4, 4), (3, 4, 7, 9)]


def together(handle: Any, run: Any) -> dict[str, float]:
    want = run()
    handle.reset()
    with sequence_parallel(handle):
        got = run()
    return {"far": tiny.relative(got, want)}


def causal(family: str) -> dict[str, float]:
    model, inputs = built(family, heads=3)
    handle = accelerate(model)
    causal_frames(handle)
    return together(handle, lambda: tiny.run(model, inputs))


def regions(prompts: bool) -> dict[str, float]:
    model, inputs = built("wan", heads=3)
    text = inputs["encoder_hidden_states"]
    both = (torch.randn(text.shape), torch.randn(text.shape)) if prompts else (None, None)
    handle = accelerate(model).regions(Regions(BOXES, *both, position_steps=9, text_steps=9))
    return together(handle, lambda: tiny.run(model, inputs))


def kept() -> dict[str, float]:
    model, inputs = built("wan", heads=3)
    handle = accelerate(model)
    frame_model = FrameModel(handle, {"encoder_hidden_states": inputs["encoder_hidden_states"]})
    draw = ARDiffusion(frame_model, ARSchedule(5, 3, 2), FlowEuler([1.0, 0.6, 0.3, 0.0]), keep=True)
    noise = torch.randn(1, 4, 5, 14, 18, generator=torch.Generator().manual_seed(0))
    return together(handle, lambda: draw(noise))


def run() -> dict[str, dict[str, float]]:
    return {
        "causal wan": causal("wan"),
        "causal cogvideox": causal("cogvideox"),
        "regions": regions(prompts=False),
        "prompts": regions(prompts=True),
        "kept": kept(),
    }
