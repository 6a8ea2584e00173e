"""One transformer as a rollout calls it: a chunk at a noise level, in every guidance branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdit_fast.models.explicit import ExplicitStep
from vdit_fast.models.session import Session
from vdit_fast.streaming.attach import CachedAttention

__all__ = ["ChunkModel", "StreamedChunk"]

PREDICTIONS = ("velocity", "x0")


@dataclass(frozen=True)
class StreamedChunk:
    """Some frames of a streamed video."""

    index: int
    first_frame: int
    """Number of its first latent frame; a clip that was given comes before it."""
    latents: Tensor
    """fp32 [B, C, F, H, W], clean."""
    frames: Any = None
    """What ``decode`` made of the latents, None without one."""


class ChunkModel:
    """Predicts the clean chunk, and writes finished frames into the caches.

    Args:
        session: of the accelerated transformer.
        module: the transformer.
        attention: its caches.
        prompts: arguments of the transformer that differ between the guidance branches, the conditional one first.
        arguments: further ones, the same for all.
        guidance: weight of classifier-free guidance, combined in x0 space.
        prediction: what the transformer returns: "velocity", noise - x0, or "x0".
    """

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        attention: CachedAttention,
        prompts: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        guidance: float,
        prediction: str,
    ) -> None:
        self.session = session
        self.module = module
        self.attention = attention
        self.prompts = tuple(prompts)
        self.arguments = dict(arguments)
        self.guidance = guidance
        self.prediction = prediction
        self.chunks = 0
        self.dtype: torch.dtype = getattr(module, "dtype", torch.float32)

    def reserve(self, frames: int) -> None:
        """Begin the next chunk."""
        self.attention.reserve(frames)
        self.chunks += 1
        self.session.streamed["frames"] += frames
        self.session.streamed["chunks"] += 1

    def predict(self, x: Tensor, timestep: float, step: int, steps: int) -> Tensor:
        """The clean chunk fp32 [B, C, F, H, W], from x of this shape at ``timestep`` in [0, 1000]."""
        sigma = timestep / 1000
        found = []
        for branch, prompt in enumerate(self.prompts):
            out = self._run(x, timestep, branch, prompt, "denoise", step=step, steps=steps)
            found.append(x - sigma * out if self.prediction == "velocity" else out)
        return found[0] if len(found) == 1 else found[1] + self.guidance * (found[0] - found[1])

    def write(self, x: Tensor, timestep: float, causal: int = 0) -> None:
        """Leave the keys and values of finished frames in the chunk's pages.

        Args:
            causal: the frames in blocks of so many, see ``CachedAttention.branch``.
        """
        for branch, prompt in enumerate(self.prompts):
            self._run(x, timestep, branch, prompt, "write", causal=causal)

    @torch.no_grad()
    def _run(
        self,
        x: Tensor,
        timestep: float,
        branch: int,
        prompt: Mapping[str, Any],
        kind: str,
        *,
        step: int | None = None,
        steps: int | None = None,
        causal: int = 0,
    ) -> Tensor:
        if not self.session.active:
            raise RuntimeError("stream: the acceleration was removed; call vdit_fast.accelerate and stream again")
        named = ExplicitStep(self.session.tracker, step, timestep, None, branch, None, steps, self.chunks - 1)
        t = torch.full((x.shape[0],), timestep, device=x.device)
        with named, self.attention.branch(branch, causal):
            out = self.module(hidden_states=x.to(self.dtype), timestep=t, **prompt, **self.arguments, return_dict=False)
        streamed = self.session.streamed
        streamed[kind] += 1
        streamed["nbytes"] = max(streamed["nbytes"], self.attention.nbytes)
        found: Tensor = out[0]
        return found.float()
