"""What the tests of rollouts share: tiny causal-looking models, recorded streams, and the same computed at once."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdit_fast import stream
from vdit_fast.handle import Handle
from vdit_fast.streaming import SelfForcing, per_frame, teacher_forcing

sys.path.insert(0, str(Path(__file__).parent.parent / "accelerate"))  # for the families' builders

pytest.importorskip("diffusers")
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("diffusers").setLevel(logging.ERROR)

SIZE, TOKENS = (8, 8), 16
"""Latent height and width of the tiny models, and tokens of a frame."""


def model_of(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny transformer, and what it takes besides latents and timestep."""
    from families.skyreels_v2 import skyreels
    from families.wan import wan

    if kind.startswith("skyreels"):
        model, inputs = skyreels(frame_block=3 if kind == "skyreels_ar" else 1)
    else:
        model, inputs = wan(image=kind == "wan_i2v")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn1.to_v" in name or "attn1.to_out" in name:
                parameter.mul_(4)  # what lies in the past must show in the output
    rest = {name: value for name, value in inputs.items() if name.startswith("encoder_hidden_states")}
    rest["encoder_hidden_states"] = rest["encoder_hidden_states"][:, :9].contiguous()
    return model, rest


def clip_of(target: Any, settings: SelfForcing, rest: dict[str, Any], frames: int, seed: int = 3, **kw: Any) -> Tensor:
    """All latents of a stream."""
    return torch.cat([chunk.latents for chunk in chunks_of(target, settings, rest, frames, seed, **kw)], 2)


def chunks_of(
    target: Any, settings: SelfForcing, rest: dict[str, Any], frames: int | None, seed: int = 3, **kw: Any
) -> Any:
    arguments = {name: value for name, value in rest.items() if name != "encoder_hidden_states"}
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "latent_size": SIZE} | kw
    text = rest["encoder_hidden_states"]
    return stream(target, settings, prompt_embeds=text, frames=frames, arguments=arguments, **options)


class Recorded:
    """A stream, and the inputs and outputs of its forwards."""

    def __init__(self, handle: Handle, settings: SelfForcing, rest: dict[str, Any], frames: int, **kw: Any) -> None:
        self.inputs: list[Tensor] = []
        self.timesteps: list[float] = []
        self.outputs: list[Tensor] = []
        (model,) = handle.modules
        removers = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        try:
            self.clip = clip_of(handle, settings, rest, frames, **kw)
        finally:
            for remover in removers:
                remover.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.inputs.append(kwargs["hidden_states"].clone())
        self.timesteps.append(float(kwargs["timestep"].max()))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(output[0].clone())


def at_once(handle: Handle, clean: Tensor, noisy: Tensor, t: float, settings: SelfForcing, rest: dict[str, Any]) -> Any:
    """The output for all noisy chunks behind the clean frames before them, by one block-causal forward."""
    (model,) = handle.modules
    frames = clean.shape[2]
    timesteps = torch.tensor([settings.context_noise, t]).repeat_interleave(frames).expand(clean.shape[0], -1)
    held = {name: getattr(settings, name) for name in ("chunk_frames", "cache_frames", "sinks")}
    with teacher_forcing(handle, **held), torch.no_grad():
        both = torch.cat([clean, noisy], 2).to(model.dtype)
        out = model(hidden_states=both, **rest, **per_frame(handle, timesteps, both), return_dict=False)[0]
    return out[:, :, frames:]
