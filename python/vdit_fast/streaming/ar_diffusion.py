"""A clip whose later frames are noisier than the earlier ones while it is drawn (AR-Diffusion)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vdit_fast.streaming.ar_schedule import ARSchedule, Iteration
from vdit_fast.streaming.frame_model import FrameModel
from vdit_fast.streaming.frame_sampler import FrameSampler
from vdit_fast.streaming.kept_frames import KeptFrames

__all__ = ["ARDiffusion"]

CLEAN = 0.0
"""The timestep of a frame that is finished."""


class ARDiffusion:
    """Draws clips by an ``ARSchedule`` (AR-Diffusion, arXiv 2503.07418).

    The model sees every frame at its own timestep; frames that wait at the first one, finished ones at 0. Only frames
    that take a step are written. With ``ar_step`` 0 this is the plain sampler, bit for bit.

    Args:
        model: the transformer and its conditions.
        schedule: which frame moves when.
        sampler: ``DDIM`` or ``FlowEuler`` with as many steps as the schedule.
        keep: make attention causal over the schedule's blocks, and keep the keys and values of finished frames, which
            run once more when they have finished and never again. For models trained so; the clip is the one that
            causal attention over the whole clip gives.

    Raises:
        ValueError: the numbers of steps differ, or ``keep`` with a window, which leaves finished frames out.
        NotImplementedError: ``keep`` in a model whose keys change with the whole video.
    """

    def __init__(self, model: FrameModel, schedule: ARSchedule, sampler: FrameSampler, *, keep: bool = False) -> None:
        if keep and schedule.window is not None:
            raise ValueError(f"keep: all finished frames are read, but the schedule has a window of {schedule.window}")
        self.kept: KeptFrames | None = model.keep(schedule.frames, schedule.block) if keep else None
        """Of the clip that was drawn last."""
        if len(sampler.timesteps) != schedule.steps:
            raise ValueError(f"the schedule has {schedule.steps} steps, the sampler {len(sampler.timesteps)}")
        self.model, self.schedule, self.sampler = model, schedule, sampler
        self._timesteps = (*sampler.timesteps, CLEAN)

    def __call__(self, noise: Tensor) -> Tensor:
        """The clip [B, C, F, h, w] of this noise."""
        *_, (_, clip) = self.iterate(noise)
        return clip

    def iterate(self, noise: Tensor) -> Iterator[tuple[Iteration, Tensor]]:
        """Every iteration with the clip behind it, one tensor that the next iteration goes on writing.

        Raises:
            ValueError: the noise has another number of frames than the schedule.
        """
        if noise.ndim != 5 or noise.shape[2] != self.schedule.frames:
            raise ValueError(
                f"noise must be [B, C, {self.schedule.frames}, h, w] as the schedule says, got {list(noise.shape)}"
            )
        clip = noise.clone()
        if self.kept is not None:
            self.kept = self.model.keep(self.schedule.frames, self.schedule.block)
        self.model.begin()
        for number, iteration in enumerate(self.schedule):
            self._advance(clip, number, iteration)
            yield iteration, clip

    @torch.no_grad()
    def _advance(self, clip: Tensor, number: int, iteration: Iteration) -> None:
        seen, active, kept = iteration.window, iteration.active, self.kept
        if kept is not None:
            seen = kept.take(sum(n == self.schedule.steps for n in iteration.done), active.stop)
        timesteps = [self._timesteps[iteration.done[frame]] for frame in seen]
        predicted = self.model(
            clip[:, :, seen.start : seen.stop],
            timesteps,
            step=number,
            num_steps=len(self.schedule),
            window=seen if kept is None else None,  # nothing else remembers frames beside a cache of them
            within=None if kept is None else kept.branch,
        )
        moving = clip[:, :, active.start : active.stop]
        predicted = predicted[:, :, active.start - seen.start : active.stop - seen.start]
        moving.copy_(self.sampler.move(moving, predicted, iteration.done[active.start : active.stop]))
