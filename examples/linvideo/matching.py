"""Any-timestep matching: the frozen original says what a converted model should answer, wherever sampling may lead.

A *call* is one evaluation of the transformer. Calls come from sampling runs of the original (no data needed; the number
of steps varies, so that every noise level occurs, and both guidance branches do), from runs of the converted model
itself (where its own errors lead it), and from noised procedural clips. The target is always the original's answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from data import sample_clip
from torch import Tensor, nn

from vdit_fast.demo.architecture import SHIFT
from vdit_fast.demo.prompts import COLOURS, DIRECTIONS, SHAPES, embed
from vdit_fast.demo.sampler import DemoPipeline

STEPS = (4, 8)  # of a sampling run: fewest, most
PROMPT_DROP = 0.2


@dataclass(frozen=True)
class Call:
    """Arguments of one evaluation of the transformer, and the original's answer.

    Attributes:
        x: [1, 3, frames, height, width], the state.
        sigma: noise level in (0, 1].
        text: [1, tokens, channels].
        target: clean clip that the original predicts, in x's shape; None: not asked yet.
    """

    x: Tensor
    sigma: float
    text: Tensor
    target: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return {
            "hidden_states": self.x,
            "timestep": torch.tensor([self.sigma * 1000]),
            "encoder_hidden_states": self.text,
            "return_dict": False,
        }


def random_prompt(rng: random.Random) -> str:
    colours = rng.sample(list(COLOURS), rng.choice((1, 2)))
    return ", ".join(f"{colour} {rng.choice(SHAPES)} {rng.choice(list(DIRECTIONS))}" for colour in colours)


@torch.no_grad()
def trajectory(model: nn.Module, rng: random.Random, frames: int, side: int) -> list[Call]:
    """The calls of one sampling run of ``model`` with its own answers as targets."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        x, timestep, text = args
        calls.append(Call(x, float(timestep[0]) / 1000, text, output[0]))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        size = {"frames": frames, "height": side, "width": side}
        steps, seed = rng.randint(*STEPS), rng.randrange(2**31)
        DemoPipeline(model)(random_prompt(rng), steps=steps, seed=seed, **size)
    finally:
        hook.remove()
    return calls


def noised_clip(rng: random.Random, frames: int, side: int) -> Call:
    """A procedural clip at a noise level drawn as in training."""
    clip, prompt = sample_clip(frames, side, side, rng)
    u = rng.random()
    sigma = max(SHIFT * u / (1 + (SHIFT - 1) * u), 1e-3)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    text = embed("" if rng.random() < PROMPT_DROP else prompt)[None]
    return Call((clip * (1 - sigma) + noise * sigma)[None], sigma, text)


@torch.no_grad()
def asked(original: nn.Module, call: Call) -> Call:
    """The call with the original's answer as target."""
    return replace(call, target=original(**call.arguments())[0])


def matching_loss(model: nn.Module, call: Call) -> Tensor:
    """Squared distance of the predicted clean clips, weighted over noise levels as in the demo model's training."""
    assert call.target is not None
    answer = model(**call.arguments())[0]
    return (answer - call.target).square().mean() / (call.sigma**2 + 0.05)
