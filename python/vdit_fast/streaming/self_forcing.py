"""Self Forcing: chunks of frames, a few denoise steps each, over the keys and values of the frames before.

Self Forcing (arXiv 2506.08009) trains a causal student on its own rollouts; Self-Forcing++ (arXiv 2510.02283) trains it
on longer ones and generates in the same way, minutes long.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_fast.caching.checks import choice, count, number, size
from vdit_fast.streaming.forward import PREDICTIONS, ChunkModel
from vdit_fast.streaming.kv_cache import STORES

__all__ = ["SelfForcing"]


@dataclass(frozen=True, kw_only=True)
class SelfForcing:
    """Settings of a rollout; the defaults are those of the published 1.3B student.

    A chunk starts as noise. Every step predicts the clean chunk and noises it again, with new noise, to the next step's
    level; the last prediction is the chunk. Before the next chunk, one forward over the finished chunk at
    ``context_noise`` writes the keys and values that later chunks read: ``len(timesteps) + 1`` forwards per chunk and
    guidance branch.

    Args:
        chunk_frames: latent frames per chunk: 3, or 1 for frame-wise generation.
        timesteps: of the denoise steps before the shift, falling, in (0, 1000].
        shift: sigma = shift t / (1 + (shift - 1) t) for t = timestep / 1000, as the flow schedulers do; 1 leaves them.
        cache_frames: latent frames held, the current chunk's included.
        sinks: the first so many frames are never forgotten.
        store: "post_rope": keys as they were rotated at their absolute frame numbers, until the model's table of
            positions ends; "pre_rope": keys are rotated anew to their place among the frames held, without any end.
        context_noise: timestep at which finished frames are written.
        guidance: weight of classifier-free guidance; 1 is none. A cache for each branch.
        prediction: what the model returns: "velocity" (noise - x0: Wan, SkyReels-V2), or "x0".
        max_bytes: refuse a larger cache per branch: bytes, or text such as "8 GB".

    Raises:
        TypeError, ValueError: a number out of range, or settings that do not go together.
    """

    chunk_frames: int = 3
    timesteps: Sequence[float] = (1000, 750, 500, 250)
    shift: float = 5.0
    cache_frames: int = 21
    sinks: int = 0
    store: str = "post_rope"
    context_noise: float = 0.0
    guidance: float = 1.0
    prediction: str = "velocity"
    max_bytes: int | str | None = None

    def __post_init__(self) -> None:
        count("chunk_frames", self.chunk_frames, 1)
        count("cache_frames", self.cache_frames, 1)
        count("sinks", self.sinks, 0)
        choice("store", self.store, STORES)
        choice("prediction", self.prediction, PREDICTIONS)
        steps = tuple(self.timesteps)
        falling = all(a > b for a, b in itertools.pairwise(steps))
        if not steps or not falling or not all(0 < step <= 1000 for step in steps):
            raise ValueError(f"timesteps must be falling numbers in (0, 1000], the first one the noisiest, got {steps}")
        object.__setattr__(self, "timesteps", tuple(float(step) for step in steps))
        number("shift", self.shift, 1e-3, 1e3)
        number("context_noise", self.context_noise, 0, 1000)
        number("guidance", self.guidance, -1e3, 1e3)
        if self.chunk_frames + self.sinks > self.cache_frames:
            raise ValueError(
                f"cache_frames is {self.cache_frames}, but a chunk of {self.chunk_frames} and {self.sinks} sinks must "
                "fit; enlarge it"
            )
        if self.max_bytes is not None:
            size("max_bytes", self.max_bytes)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of every denoise step, shifted."""
        return tuple(self.shift * t / (1000 + (self.shift - 1) * t) for t in self.timesteps)

    def rollout(
        self,
        model: ChunkModel,
        shape: tuple[int, int, int, int],
        frames: int | None,
        *,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[Tensor]:
        """Yield one chunk after another, fp32 [B, C, F, H, W]; see ``vdit_fast.stream``.

        Args:
            model: the transformer with its caches.
            shape: (B, C, H, W) of the latents.
            frames: latent frames to generate, the last chunk maybe shorter; None: without end.
            initial: clean latents [B, C, F0, H, W] of the frames before the first generated one.
            generator: of the noise; on a CPU the same noise for every device.
            device: where the model runs.
        """
        if initial is not None:
            self.prefill(model, initial.to(device, torch.float32))
        finished: Tensor | None = None
        done = 0
        while frames is None or done < frames:
            if finished is not None:
                model.write(finished, self.context_noise)
            length = self.chunk_frames if frames is None else min(self.chunk_frames, frames - done)
            model.reserve(length)
            finished = self._denoise(model, (*shape[:2], length, *shape[2:]), generator, device)
            done += length
            yield finished.clone()  # what is written for the next chunk is nobody else's

    def prefill(self, model: ChunkModel, clip: Tensor) -> None:
        """Write the frames of a clip: those that the cache holds at once in one block-causal forward.

        A first block takes what is left over by whole chunks, such as a single image before chunks of three.
        """
        frames, chunk = clip.shape[2], self.chunk_frames
        first = frames % chunk
        together = min(frames, self.cache_frames) - first
        together -= together % chunk
        lengths = [first, together, *[chunk] * ((frames - first - together) // chunk)]
        for part in clip.split(lengths, dim=2):
            if part.shape[2]:
                model.reserve(part.shape[2])
                model.write(part, self.context_noise, causal=chunk if part.shape[2] > chunk else 0)

    def _denoise(
        self,
        model: ChunkModel,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        steps = len(self.timesteps)
        x = _noise(shape, generator, device)
        for step, sigma in enumerate(self.sigmas):
            clean = model.predict(x, 1000 * sigma, step, steps)
            if step + 1 < steps:
                after = self.sigmas[step + 1]
                x = (1 - after) * clean + after * _noise(shape, generator, device)
        return clean


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    made_on = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=made_on).to(device)
