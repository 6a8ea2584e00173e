"""One denoising step of frames that are at different steps: DDIM and the Euler step of flow matching."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vdit_fast.caching.checks import choice

__all__ = ["DDIM", "FlowEuler", "FrameSampler"]


class FrameSampler(Protocol):
    """A sampler without memory between steps, so that every frame may be at its own."""

    timesteps: tuple[float, ...]
    """What the model is told at the beginning of each step, noisiest first."""

    def move(self, x: Tensor, prediction: Tensor, done: Sequence[int]) -> Tensor:
        """One step for every frame.

        Args:
            x, prediction: [B, C, F, ...].
            done: steps behind each of the F frames, below ``len(timesteps)``.

        Returns:
            the frames one step on, in x's dtype; x is not changed.
        """
        ...


class DDIM:
    """Deterministic DDIM (arXiv 2010.02502), in the arithmetic of diffusers' ``DDIMScheduler`` with ``eta`` 0.

    Args:
        timesteps: of the steps, noisiest first.
        alphas: cumulative product of alpha at each step, and behind the last one: one number more than timesteps.
        prediction: what the model gives: "epsilon", "sample" (x0) or "v_prediction".
    """

    def __init__(self, timesteps: Sequence[float], alphas: Sequence[float], prediction: str = "epsilon") -> None:
        self.timesteps = tuple(float(t) for t in timesteps)
        choice("prediction", prediction, ("epsilon", "sample", "v_prediction"))
        self.prediction = prediction
        table = torch.as_tensor(alphas, dtype=torch.float32, device="cpu")
        _check(self.timesteps, table, "alphas")
        if not bool(((table > 0) & (table <= 1)).all()):
            raise ValueError(f"alphas must lie in (0, 1], got {table.min():g} ... {table.max():g}")
        self._alphas = table

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> DDIM:
        """The steps of a diffusers ``DDIMScheduler`` after ``set_timesteps``.

        Raises:
            ValueError: it clips or thresholds, or its steps do not follow on each other.
        """
        config = scheduler.config
        for name in ("clip_sample", "thresholding"):
            if config[name]:
                raise ValueError(f"scheduler: {name} is on, which DDIM has not; build the scheduler with {name}=False")
        times = [int(t) for t in scheduler.timesteps]
        stride = config["num_train_timesteps"] // len(times)
        if any(before - after != stride for before, after in itertools.pairwise(times)):
            raise ValueError(
                f"scheduler: its timesteps {times[:3]} ... are not {stride} apart: a step does not end where the next "
                'begins; use timestep_spacing "leading" or "trailing" and a number of steps that divides '
                f"{config['num_train_timesteps']}"
            )
        last = scheduler.final_alpha_cumprod if times[-1] < stride else scheduler.alphas_cumprod[times[-1] - stride]
        alphas = [*scheduler.alphas_cumprod[times].tolist(), float(last)]
        return cls([float(t) for t in times], alphas, config["prediction_type"])

    def move(self, x: Tensor, prediction: Tensor, done: Sequence[int]) -> Tensor:
        """See ``FrameSampler``."""
        now, after = (_per_frame(self._alphas, [n + ahead for n in done], x) for ahead in (0, 1))
        noise = 1 - now
        if self.prediction == "epsilon":
            epsilon = prediction
            clean = (x - noise**0.5 * epsilon) / now**0.5
        elif self.prediction == "sample":
            clean = prediction
            epsilon = (x - now**0.5 * clean) / noise**0.5
        else:
            clean = now**0.5 * x - noise**0.5 * prediction
            epsilon = now**0.5 * prediction + noise**0.5 * x
        return (after**0.5 * clean + (1 - after) ** 0.5 * epsilon).to(x.dtype)


class FlowEuler:
    """The Euler step of flow matching, x = (1 - sigma) x0 + sigma noise.

    Args:
        sigmas: noise level at the beginning of each step, falling, and behind the last one.
        prediction: what the model gives: "velocity" (noise - x0), or "sample" (x0).
        floor: with "sample": v = (x - x0) / max(sigma, floor).
        timesteps: what the model is told; 1000 * sigma by default.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        prediction: str = "velocity",
        *,
        floor: float = 0.0,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        table = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu")
        times = [1000.0 * s for s in table[:-1].tolist()] if timesteps is None else timesteps
        self.timesteps = tuple(float(t) for t in times)
        choice("prediction", prediction, ("velocity", "sample"))
        self.prediction = prediction
        _check(self.timesteps, table, "sigmas")
        if not bool((table[:-1] > table[1:]).all()) or not 0 <= float(table[-1]) < float(table[0]) <= 1:
            raise ValueError(f"sigmas must fall inside [0, 1], got {table.tolist()}")
        if not 0 <= floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {floor!r}")
        self._steps = table[1:] - table[:-1]
        keep = 1 + self._steps / table[:-1].clamp(min=floor)
        self._keep = torch.where(table[1:] == 0, torch.zeros(()), keep)  # the last step gives x0 itself

    @classmethod
    def from_scheduler(cls, scheduler: Any, prediction: str = "velocity", *, floor: float = 0.0) -> FlowEuler:
        """The steps of a diffusers ``FlowMatchEulerDiscreteScheduler`` after ``set_timesteps``."""
        times = scheduler.timesteps.tolist()
        return cls(scheduler.sigmas.tolist(), prediction, floor=floor, timesteps=times)

    def move(self, x: Tensor, prediction: Tensor, done: Sequence[int]) -> Tensor:
        """See ``FrameSampler``."""
        if self.prediction == "velocity":
            return (x + _per_frame(self._steps, done, x) * prediction).to(x.dtype)
        return (prediction + _per_frame(self._keep, done, x) * (x - prediction)).to(x.dtype)


def _check(timesteps: tuple[float, ...], table: Tensor, name: str) -> None:
    if table.ndim != 1 or len(table) != len(timesteps) + 1 or not timesteps:
        raise ValueError(
            f"{name} must be one number per timestep and one behind the last, got {list(table.shape)} for "
            f"{len(timesteps)} timesteps"
        )
    if not bool(table.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {table.tolist()}")


def _per_frame(table: Tensor, index: Sequence[int], x: Tensor) -> Tensor:
    """fp32 entries of a table on the CPU for the frames of x [B, C, F, ...]: [F, 1, ...] on its device."""
    return table[list(index)].to(x.device, non_blocking=True).view(-1, *(1,) * (x.ndim - 3))
