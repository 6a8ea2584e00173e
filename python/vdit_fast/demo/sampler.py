"""Drawing a clip with the demo model: flow matching with diffusers' Euler scheduler and a network that predicts x0."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vdit_fast.demo.architecture import FRAMES, HEIGHT, SHIFT, SIGMA_FLOOR, WIDTH
from vdit_fast.demo.prompts import embed

STEPS, GUIDANCE = 16, 3.0
Progress = Callable[[int, int], None]


@dataclass
class Sample:
    """One drawn clip.

    Attributes:
        clip: fp32 ``[frames, 3, height, width]`` in [0, 1].
        sigmas: noise level at the start of each step, 1 = pure noise.
        step_seconds: wall-clock seconds of each step, both guidance branches included.
        latents: the state after each step, fp32 ``[3, frames, height, width]``, pixels in [-1, 1]; empty unless asked.
    """

    clip: torch.Tensor
    sigmas: list[float]
    step_seconds: list[float]
    latents: list[torch.Tensor] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(self.step_seconds)


class DemoPipeline:
    """A pipeline in diffusers' shape (``transformer``, ``scheduler``, ``__call__``), for ``accelerate``."""

    def __init__(self, transformer: torch.nn.Module, scheduler: Any | None = None) -> None:
        self.transformer = transformer
        self.scheduler = make_scheduler() if scheduler is None else scheduler
        self.do_classifier_free_guidance = False  # of the running call, as diffusers pipelines say it

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, as diffusers pipelines list them."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        steps: int = STEPS,
        seed: int = 0,
        guidance: float = GUIDANCE,
        frames: int = FRAMES,
        height: int = HEIGHT,
        width: int = WIDTH,
        keep_latents: bool = False,
        progress: Progress | None = None,
    ) -> Sample:
        """Draw the clip of ``prompt``; the same seed and sizes start from the same noise on every device.

        Args:
            prompt: see :mod:`vdit_fast.demo.prompts`; the empty prompt draws without guidance.
            steps: denoising steps, at least 1.
            guidance: classifier-free guidance scale, combined in x0 space; 1 switches it off.
            frames, height, width: in pixels, multiples of the transformer's patch.
            keep_latents: return the state after every step.
            progress: called with ``(steps done, steps)`` after every step.

        Raises:
            ValueError: a number out of range, a size that is no multiple of the patch, or an unknown word.
        """
        check_sizes(self.transformer, steps, guidance, frames, height, width)
        weight = next(self.transformer.parameters(), torch.empty(0))
        # the first parameter may be one that stays fp32 in a bf16 model: diffusers knows which dtype the inputs need
        text = embed(prompt)[None].to(weight.device, getattr(self.transformer, "dtype", weight.dtype))
        blank = torch.zeros_like(text)
        guided = self.do_classifier_free_guidance = guidance != 1.0 and bool(text.any())
        noise = torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))
        x = noise.to(weight.device)

        # linspace before the shift, as diffusers' flow pipelines call it: the last step starts well above sigma = 0
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), device=weight.device)
        self.scheduler.set_begin_index(0)
        sigmas = self.scheduler.sigmas.tolist()
        sample = Sample(x, sigmas[:-1], [])
        for i, t in enumerate(self.scheduler.timesteps):
            start = time.perf_counter()
            x0 = self._predict(x, t, text)
            if guided:
                free = self._predict(x, t, blank)
                x0 = free + guidance * (x0 - free)
            velocity = (x - x0) / max(sigmas[i], SIGMA_FLOOR)  # d x / d sigma of x = (1 - sigma) x0 + sigma noise
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
            if i == steps - 1:
                x = x0  # what the step gives where sigma is above the floor, and the clean clip where it is not
            _synchronise(x)
            sample.step_seconds.append(time.perf_counter() - start)
            if keep_latents:
                sample.latents.append(x[0].cpu())
            if progress is not None:
                progress(i + 1, steps)
        sample.clip = ((x[0].clamp(-1, 1) + 1) / 2).movedim(1, 0).cpu().contiguous()
        return sample

    def _predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Clean clip, fp32, predicted from ``x`` at ``t`` = 1000 sigma."""
        out = self.transformer(x.to(text.dtype), t.expand(x.size(0)), text, return_dict=False)
        return out[0].float()


def sample(model: torch.nn.Module, prompt: str, **options: Any) -> Sample:
    """Draw the clip of ``prompt`` with ``model``; ``options`` are those of :meth:`DemoPipeline.__call__`."""
    return DemoPipeline(model)(prompt, **options)


def make_scheduler() -> Any:
    """Return the scheduler that the model was trained for.

    Raises:
        ImportError: diffusers is missing (extra ``diffusers``).
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise ImportError(f"the demo needs diffusers ({error}): pip install 'vdit-fast[diffusers]'") from error
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def check_sizes(model: torch.nn.Module, steps: int, guidance: float, frames: int, height: int, width: int) -> None:
    """Raise ValueError where a model cannot draw clips of so many pixels; the message names the number."""
    if steps < 1:
        raise ValueError(f"steps: {steps}; at least 1 is needed")
    if not (guidance == guidance and abs(guidance) < 1e6):
        raise ValueError(f"guidance: {guidance}; a finite number is needed, 1 switches guidance off")
    config = getattr(model, "config", None)
    patch = tuple(getattr(config, "patch_size", (1, 1, 1)))
    limit = getattr(config, "rope_max_seq_len", None)
    for name, size, p in zip(("frames", "height", "width"), (frames, height, width), patch, strict=True):
        if size < p or size % p:
            raise ValueError(f"{name}: {size}; a positive multiple of the patch, {p}, is needed")
        if limit is not None and size // p > limit:
            raise ValueError(f"{name}: {size}; the model's position table ends at {limit * p}")


def _synchronise(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
