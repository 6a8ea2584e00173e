"""CMD: Efficient Video Diffusion Models via Content-Frame Motion-Latent Decomposition (arXiv 2403.14148).

An image model makes one content frame, a small transformer the motion latents: a short sequence that is no grid of
frames, rows and columns, conditioned on the content frame's patches. Two models of different width, heads and length
run in one pipeline.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config

pytest.importorskip("diffusers")

MOTION = 37  # latents; no product of frames, rows and columns
WIDTH, HEADS = 48, 3


class MotionModel(nn.Module):
    """A stand-in with the attention shapes of the motion network, of diffusers' Wan blocks with random weights."""

    def __init__(self, condition: int) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        self.embed = nn.Linear(5, WIDTH)
        self.condition = nn.Linear(condition, WIDTH)
        self.place = nn.Parameter(torch.randn(1, MOTION, WIDTH))
        self.time = nn.Linear(1, 6 * WIDTH)
        self.blocks = nn.ModuleList(WanTransformerBlock(WIDTH, 2 * WIDTH, HEADS) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, hidden_states: Tensor, timestep: Tensor, content: Tensor) -> Tensor:
        x = self.embed(hidden_states) + self.place
        frame = self.condition(content.flatten(2).mT)
        time = self.time(timestep[:, None].to(x.dtype) / 1000).unflatten(1, (6, WIDTH))
        for block in self.blocks:
            x = block(x, frame, time, None)
        return self.head(x)


def pipeline() -> tuple[Any, dict[str, Any], Tensor]:
    """The two models, the content model's inputs (one frame of 5 x 7 patches), and motion latents."""
    torch.manual_seed(1)
    content, inputs = tiny.wan(frames=1)
    inputs["hidden_states"] = torch.randn(1, 4, 1, 10, 14)
    motion = MotionModel(4).eval().requires_grad_(False)
    return SimpleNamespace(content=content, motion=motion), inputs, torch.randn(1, MOTION, 5)


def generate(pipe: Any, inputs: dict[str, Any], motion: Tensor) -> tuple[Tensor, Tensor]:
    """One step of either model; the motion model sees the content model's frame."""
    dtype = motion.dtype
    with torch.no_grad():
        frame = tiny.run(pipe.content, inputs)
        return frame, pipe.motion(motion, torch.full((len(motion),), 500.0, dtype=dtype), frame)


def test_both_models_are_served_and_agree():
    pipe, inputs, motion = pipeline()
    twin = SimpleNamespace(**{name: copy.deepcopy(model).double() for name, model in vars(pipe).items()})
    truth = generate(twin, tiny.cast(inputs, torch.float64), motion.double())
    eager = generate(pipe, inputs, motion)
    handle = accelerate(pipe)
    for got, stock, exact in zip(generate(pipe, inputs, motion), eager, truth, strict=True):
        tiny.exact_enough(got, stock, exact)
    layers = handle.stats()["layers"]
    assert [(x["expert"], x["name"]) for x in layers] == [
        *(("content", f"blocks.{i}.attn1") for i in range(2)),
        *(("motion", f"blocks.{i}.attn1") for i in range(3)),
    ]
    assert all(x["calls"] == 1 and not x["fallbacks"] for x in layers)  # dense needs no grid
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(generate(pipe, inputs, motion), eager, strict=True))


def test_what_needs_a_grid_runs_dense_where_there_is_none_and_says_so():
    pipe, inputs, motion = pipeline()
    exact = generate(pipe, inputs, motion)
    handle = accelerate(pipe, Config(attention=tiny.Band(width=3)))
    frame, moved = generate(pipe, inputs, motion)
    assert tiny.relative(frame, exact[0]) > 1e-3  # sparse
    with torch.no_grad():
        same_frame = pipe.motion(motion, torch.full((1,), 500.0), exact[0])
    assert tiny.relative(same_frame, exact[1]) < 2e-6 and moved.shape == exact[1].shape
    layers = handle.stats()["layers"]
    for layer in layers:
        reasons = {} if layer["expert"] == "content" else {"the transformer's input has no known video grid": 2}
        assert layer["fallbacks"] == reasons
        assert layer["sparse_calls"] == (1 if layer["expert"] == "content" else 0)
    handle.reconfigure(Config(attention=tiny.Band(width=3), on_unsupported="error"))
    with pytest.raises(RuntimeError, match="no known video grid"):
        generate(pipe, inputs, motion)
