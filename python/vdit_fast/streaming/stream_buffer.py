"""A buffer of frames through which an endless video moves from noise to clean (StreamDiT, FIFO-Diffusion)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_fast.caching.checks import count
from vdit_fast.streaming.frame_model import FrameModel
from vdit_fast.streaming.frame_sampler import FrameSampler

__all__ = ["BufferSchedule", "StreamBuffer"]

CLEAN = 0.0
"""The timestep of reference frames."""


@dataclass(frozen=True)
class BufferSchedule:
    """How noise is spread over the buffer of StreamDiT (arXiv 2507.03745): K reference frames, then N chunks of c.

    Attributes:
        chunks: N, chunks in the buffer, each ``micro_steps`` steps behind the one before it.
        chunk: c, frames of a chunk.
        micro_steps: s, steps between two chunks that leave.
        reference: K, clean frames before the chunks: those that left last.

    One chunk of all frames is ordinary sampling; chunks of one frame and one micro-step are the diagonal of
    FIFO-Diffusion (arXiv 2405.11473). StreamDiT has c = 2, N = 8, and s = 16 before distillation, 1 after it.
    """

    chunks: int
    chunk: int = 1
    micro_steps: int = 1
    reference: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chunks", 1), ("chunk", 1), ("micro_steps", 1), ("reference", 0)):
            count(name, getattr(self, name), least)

    @property
    def steps(self) -> int:
        """T = s * N, steps of every frame."""
        return self.micro_steps * self.chunks

    @property
    def frames(self) -> int:
        """B = K + N * c, frames in the buffer."""
        return self.reference + self.chunks * self.chunk

    def left(self, micro_step: int) -> int:
        """Chunks that have left before evaluation ``micro_step``."""
        count("micro_step", micro_step, 0)
        return (micro_step - self.steps) // self.micro_steps + 1 if micro_step >= self.steps else 0

    def done(self, micro_step: int) -> tuple[int, ...]:
        """Steps behind each frame of the chunks before evaluation ``micro_step`` of the stream, from the first on.

        In the first s * (N - 1) evaluations chunks start one after the other; those that wait are at 0.
        """
        first = micro_step - self.left(micro_step) * self.micro_steps
        behind = [min(max(first - number * self.micro_steps, 0), self.steps) for number in range(self.chunks)]
        return tuple(n for n in behind for _ in range(self.chunk))


class StreamBuffer:
    """Draws an endless video chunk by chunk at constant memory.

    The buffer always holds and shows the model ``schedule.frames`` frames. It starts full of noise: the first chunk
    begins, ``micro_steps`` evaluations later the second one, and so on; the first leaves after ``schedule.steps``
    evaluations and a further one every ``micro_steps``. A chunk that leaves makes room for fresh noise at the end.

    Args:
        model: the transformer and its conditions.
        schedule: see ``BufferSchedule``.
        sampler: ``FlowEuler`` or ``DDIM`` with ``schedule.steps`` steps.
        shape: (batch, channels, height, width) of the latents.
        reference: clean latents [B, C, K, h, w] to begin with, where ``schedule.reference`` is K > 0. Chunks that leave
            take their place.
        generator: of the noise.
        device, dtype: of the latents.

    Raises:
        ValueError: numbers of steps that differ, or reference frames of another shape.
    """

    def __init__(
        self,
        model: FrameModel,
        schedule: BufferSchedule,
        sampler: FrameSampler,
        shape: tuple[int, int, int, int],
        *,
        reference: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(sampler.timesteps) != schedule.steps:
            raise ValueError(
                f"the buffer has {schedule.steps} steps (micro_steps {schedule.micro_steps} * chunks "
                f"{schedule.chunks}), the sampler {len(sampler.timesteps)}"
            )
        if len(shape) != 4:
            raise ValueError(f"shape must be (batch, channels, height, width), got {shape!r}")
        self.model, self.schedule, self.sampler = model, schedule, sampler
        self._shape, self._generator, self._dtype = shape, generator, dtype
        self._device = torch.device(device) if device is not None else None
        self._timesteps = (*sampler.timesteps, CLEAN)
        clean = self._checked(reference)
        chunks = [self.noise() for _ in range(schedule.chunks)]
        self.latents = torch.cat([*clean, *chunks], dim=2)
        """[B, C, K + N * c, h, w], the cleanest first."""
        self.evaluations = 0
        """Micro-steps so far."""

    def _checked(self, reference: Tensor | None) -> list[Tensor]:
        batch, channels, height, width = self._shape
        wanted = [batch, channels, self.schedule.reference, height, width]
        if reference is None and self.schedule.reference == 0:
            return []
        if reference is None or list(reference.shape) != wanted:
            got = "none" if reference is None else str(list(reference.shape))
            raise ValueError(f"reference must be the clean latents {wanted} to begin with, got {got}")
        self._device = reference.device if self._device is None else self._device
        return [reference.to(self._device, self._dtype)]

    def noise(self) -> Tensor:
        """A chunk of fresh noise [B, C, c, h, w]."""
        batch, channels, height, width = self._shape
        source = self._generator.device if self._generator is not None else self._device
        drawn = torch.randn(
            batch, channels, self.schedule.chunk, height, width,
            generator=self._generator, device=source, dtype=self._dtype,
        )  # fmt: skip
        return drawn if self._device is None else drawn.to(self._device)

    @property
    def done(self) -> tuple[int, ...]:
        """Steps behind each frame of the chunks."""
        return self.schedule.done(self.evaluations)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the model is told next, one for each frame of ``latents``; never less than of the frame before."""
        return (CLEAN,) * self.schedule.reference + tuple(self._timesteps[n] for n in self.done)

    @torch.no_grad()
    def advance(self) -> Tensor | None:
        """One evaluation: every chunk that has begun takes a step.

        Returns:
            the chunk [B, C, c, h, w] that is clean and leaves, or None.
        """
        schedule, done, number = self.schedule, self.done, self.evaluations
        if number == 0:
            self.model.begin()
        predicted = self.model(
            self.latents,
            self.timesteps,
            step=number % schedule.micro_steps,
            num_steps=schedule.micro_steps,
            window=schedule.left(number),
        )
        begun = min(number // schedule.micro_steps + 1, schedule.chunks) * schedule.chunk
        moving = slice(schedule.reference, schedule.reference + begun)
        moved = self.sampler.move(self.latents[:, :, moving], predicted[:, :, moving], done[:begun])
        self.latents[:, :, moving] = moved
        self.evaluations = number + 1
        return self._shift() if schedule.left(number + 1) > schedule.left(number) else None

    def _shift(self) -> Tensor:
        """The first chunk leaves, the others move up, noise enters; reference frames are the last that have left."""
        first, size = self.schedule.reference, self.schedule.chunk
        leaving = self.latents[:, :, first : first + size].clone()
        self.latents = torch.cat((self.latents[:, :, size:], self.noise()), dim=2)
        return leaving

    def stream(self) -> Iterator[Tensor]:
        """Chunks [B, C, c, h, w] as they leave, without end."""
        while True:
            chunk = self.advance()
            if chunk is not None:
                yield chunk
