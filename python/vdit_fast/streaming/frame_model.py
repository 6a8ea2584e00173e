"""An accelerated transformer as a function of latents and one timestep per frame, with guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.caching.checks import number

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["FrameModel"]


class FrameModel:
    """What per-frame noise schedules call.

    Args:
        handle: of ``accelerate`` on a pipeline or transformer; it must serve one transformer.
        conditions: the transformer's other arguments by name, such as ``encoder_hidden_states``; for guidance a pair of
            them, conditional and unconditional.
        guidance: scale of classifier-free guidance; 1 runs the conditional branch only.

    Raises:
        TypeError, ValueError: no such conditions, or a guidance without a pair.
        RuntimeError: several transformers, or one that takes a single timestep for all frames.
    """

    def __init__(
        self, handle: Handle, conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]], guidance: float = 1.0
    ) -> None:
        pair = [conditions] if isinstance(conditions, Mapping) else list(conditions)
        if not 1 <= len(pair) <= 2 or not all(isinstance(item, Mapping) for item in pair):
            raise TypeError("conditions must be a mapping of arguments, or two of them: conditional and unconditional")
        for name in ("hidden_states", "timestep"):
            if any(name in item for item in pair):
                raise ValueError(f"conditions hold {name!r}, which the schedule gives")
        number("guidance", guidance, 0)
        if guidance != 1 and len(pair) < 2:
            raise ValueError(f"guidance is {guidance:g}: give a pair of conditions, conditional and unconditional")
        roots = [root for root in handle.roots if root.module() is not None]
        if len(roots) != 1 or not handle.active:
            raise RuntimeError(
                f"the handle serves {len(roots) if handle.active else 0} transformers; per-frame schedules run one: "
                "accelerate that transformer by itself"
            )
        self.handle = handle
        self.guidance = float(guidance)
        self._root, self._module = roots[0], roots[0].module()
        self._conditions = pair if guidance != 1 else pair[:1]
        self._window: Any = None
        self.evaluations = 0
        """Forwards of the transformer so far."""

    def begin(self) -> None:
        """A new clip begins: nothing remembered from earlier forwards may serve it."""
        self._window = None
        self.handle.reset()

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        timesteps: Sequence[float],
        *,
        step: int | None = None,
        num_steps: int | None = None,
        window: Any = None,
    ) -> Tensor:
        """The guided prediction.

        Args:
            latents: [B, C, F, h, w].
            timesteps: of the F frames, in the model's units; the same for the whole batch.
            step, num_steps: place of this evaluation in the schedule, for planners and caches.
            window: which frames these are. When it changes, a new generation begins, so that no planner or cache takes
                what it remembers of other frames for these.

        Returns:
            [B, C, F, h, w] in the latents' dtype.
        """
        module = self._module
        assert module is not None
        if len(timesteps) != latents.shape[2]:
            raise ValueError(f"timesteps has {len(timesteps)} entries for {latents.shape[2]} frames")
        if window != self._window:
            self.begin()
            self._window = window
        times = torch.tensor(timesteps, dtype=torch.float32).to(latents.device, non_blocking=True)
        inputs = latents.to(getattr(module, "dtype", latents.dtype))
        arguments = self._root.adapter.frame_timesteps(module, times.expand(len(latents), -1), inputs)
        found = []
        with self.handle.step(step, timestep=max(timesteps), num_steps=num_steps):
            for conditions in self._conditions:
                out = module(**{**conditions, "hidden_states": inputs, **arguments, "return_dict": False})[0]
                found.append(out.to(latents.dtype))
        self.evaluations += len(found)
        if len(found) == 1:
            return found[0]
        given, free = found
        return free + self.guidance * (given - free)
