"""An accelerated transformer as a function of latents and one timestep per frame, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.caching.checks import number
from vdit_fast.models.callables import check_handle
from vdit_fast.streaming.families import check_family
from vdit_fast.streaming.kept_frames import KeptFrames

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
        check_handle("FrameModel", handle)
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
        if handle.active and not roots:
            raise RuntimeError("the transformer of this handle is gone: a handle does not keep its model alive")
        if len(roots) != 1 or not handle.active:
            raise RuntimeError(
                f"the handle serves {len(roots) if handle.active else 0} transformers; per-frame schedules run one: "
                "accelerate that transformer by itself"
            )
        self.handle = handle
        self.guidance = float(guidance)
        self._root = roots[0]
        self._module: Any = roots[0].module()  # held: the handle does not
        self._conditions = pair if guidance != 1 else pair[:1]
        self._window: Any = None
        self.evaluations = 0
        """Forwards of the transformer so far."""

    def keep(self, frames: int, block: int) -> KeptFrames:
        """Room for the keys and values of a clip's finished frames.

        Raises:
            NotImplementedError: a family whose keys cannot be kept: its context changes with the video, for example.
        """
        check_family(self._module, self._root.adapter.family)
        if self.handle.config.cache is not None or self.handle.config.subset is not None:
            raise RuntimeError("kept frames: every layer must run on all of them; set cache and subset to null")
        return KeptFrames(self._root.session, self._module, frames, block)

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
        within: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> Tensor:
        """The guided prediction.

        Args:
            latents: [B, C, F, h, w].
            timesteps: of the F frames, in the model's units; the same for the whole batch.
            step, num_steps: place of this evaluation in the schedule, for planners and caches.
            window: which frames these are. When it changes, a new generation begins, so that no planner or cache takes
                what it remembers of other frames for these.
            within: what each guidance branch's forward runs in, by the branch's number.

        Returns:
            [B, C, F, h, w] in the latents' dtype.
        """
        module = self._module
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
            for branch, conditions in enumerate(self._conditions):
                with within(branch) if within is not None else nullcontext():
                    out = module(**{**conditions, "hidden_states": inputs, **arguments, "return_dict": False})[0]
                found.append(out.to(latents.dtype))
        self.evaluations += len(found)
        if len(found) == 1:
            return found[0]
        given, free = found
        return free + self.guidance * (given - free)
