"""What the user says about an object and its path, and one model's state while it holds."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.models.forward import Forward
from vdit_fast.models.heads import AroundHeads, HeadsCall
from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.memo import remembered
from vdit_fast.positions.boxes import Box, box_rows, check_steps, early
from vdit_fast.regions.labels import region_labels, region_plan

if TYPE_CHECKING:
    from vdit_fast.context import StepContext

__all__ = ["RegionRun", "Regions"]

WHO = "regions"


@dataclass(frozen=True, eq=False)
class Regions:
    """An object that follows a box through the frames (DiTraj, arXiv 2509.21839), for ``Handle.regions``.

    In the first steps its tokens take the positions of one anchor box, and neither read the tokens that have these
    positions of themselves nor are read by them. For longer, its tokens read a prompt of their own and all others
    another one.

    Attributes:
        boxes: (top, left, bottom, right) in tokens for each latent frame, as in ``positions.anchored_rows``.
        foreground, background: text embeddings [1 or B, S, C] of the size of the prompt's own; both or neither.
        position_steps: of anchored positions and the mask of self-attention; an int n: the first n denoising steps, a
            float in [0, 1): the first floor(steps * num_steps). The paper's 5 of 50 by default; 0: never.
        text_steps: of the two prompts, which stand in for the one that the transformer is called with; 30 of 50.
        branch: the guidance branch that gets the two prompts: the conditional one, which pipelines call first.

    Raises:
        TypeError, ValueError: steps that are neither, one prompt without the other, or prompts of different sizes.
    """

    boxes: Sequence[Box]
    foreground: Tensor | None = None
    background: Tensor | None = None
    position_steps: int | float = 0.1
    text_steps: int | float = 0.6
    branch: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", copy.deepcopy(self.boxes))  # the caller's list may change
        check_steps("position_steps", self.position_steps)
        check_steps("text_steps", self.text_steps)
        if isinstance(self.branch, bool) or not isinstance(self.branch, int) or self.branch < 0:
            raise ValueError(f"branch must be a number of at least 0, got {self.branch!r}")
        if (self.foreground is None) != (self.background is None):
            raise ValueError("foreground and background: give both prompts, or neither")
        if self.foreground is None or self.background is None:
            return
        for name, text in (("foreground", self.foreground), ("background", self.background)):
            if not isinstance(text, Tensor) or text.ndim != 3 or not text.is_floating_point():
                got = f"{text.dtype} {list(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
                raise TypeError(f"{name} must be text embeddings [1 or B, S, C], got {got}")
        if self.foreground.shape[1:] != self.background.shape[1:]:
            raise ValueError(
                f"foreground {list(self.foreground.shape)} and background {list(self.background.shape)} must have as "
                "many tokens and channels"
            )


class RegionRun(AroundHeads):
    """Regions in one transformer: stands around its self-attention, and says which text its cross-attention reads."""

    def __init__(self, regions: Regions, text_input: str | None) -> None:
        self.regions = regions
        self.masked: Counter[int] = Counter()
        """Step -> forwards with the mask of self-attention."""
        self.prompted: Counter[int] = Counter()
        """Step -> forwards with two prompts."""
        self._input = text_input
        self._forward: Forward | None = None  # the one that reads two prompts
        self._counted: Forward | None = None
        self._text: tuple[Any, Tensor] | None = None
        self._rows: dict[Any, tuple[Tensor, Tensor]] = {}
        self._plans: dict[Any, AttentionPlan | None] = {}

    def fresh(self) -> RegionRun:
        return RegionRun(self.regions, self._input)

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionRun:
        return self.fresh()

    def clear(self) -> None:
        """Begin the records anew."""
        self.masked.clear()
        self.prompted.clear()
        self._forward = self._counted = None

    def phase(self, step: StepContext) -> tuple[bool, bool]:
        """Whether a step's forward has the mask of self-attention, and two prompts."""
        regions = self.regions
        masked = bool(regions.position_steps) and early("regions", "position_steps", regions.position_steps, step)
        return masked, self._prompted(step)

    def _prompted(self, step: StepContext) -> bool:
        regions = self.regions
        return (
            regions.foreground is not None
            and self._input is not None
            and early("regions", "text_steps", regions.text_steps, step)
            and step.branch == regions.branch
        )

    # ------------------------------------------------------------------ self-attention
    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        ledger = call.session.layers[call.layer]
        if ledger.always_dense is not None or not self.regions.position_steps:  # not a layer over the video, or never
            return proceed()
        forward = call.forward
        if forward is None or forward.geometry is None:
            raise RuntimeError(f"regions: {ledger.name} is called without a known step and video grid")
        if not early("regions", "position_steps", self.regions.position_steps, forward.step):
            return proceed()
        geometry = forward.geometry
        context = call.q.shape[1] - geometry.n_video
        if call.k.shape[1] != call.q.shape[1] or context < 0:
            raise RuntimeError(
                f"regions: {ledger.name} has {call.q.shape[1]} queries and {call.k.shape[1]} keys, which are not the "
                f"grid {geometry.grid} and its text; run whole videos, without a subset of tokens or cached frames"
            )
        first = geometry.history + (context - geometry.history if geometry.text_first else 0)
        grid, device = geometry.grid, call.q.device

        def made() -> AttentionPlan | None:
            return region_plan(region_labels(grid, self.regions.boxes), context, first=first, device=device)

        plan = remembered(self._plans, (grid, context, first, device), made)
        if plan is None:
            return proceed()
        if call.plan is not None or call.mask is not None:
            raise RuntimeError(
                f"regions: {ledger.name} follows {call.planned or 'a mask of the model'} already, and two such rules "
                "are not joined; set position_steps=0 or take the other one off"
            )
        if self._counted is not forward:
            self._counted = forward
            self.masked[forward.step.step] += 1
        call.plan, call.planned = plan, "regions: box tokens do not read redundant ones"
        return proceed()

    # ------------------------------------------------------------------ cross-attention
    def exchange(self, forward: Forward | None, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a forward that begins: the two prompts, background first, in place of the one."""
        self._forward = None
        if forward is None or not self._prompted(forward.step):
            return {}
        assert self._input is not None
        prompt = arguments.get(self._input)
        if not isinstance(prompt, Tensor) or prompt.ndim != 3:
            raise RuntimeError(f"regions: the transformer is called without text embeddings ({self._input})")
        key = prompt.shape, prompt.dtype, prompt.device
        if self._text is None or self._text[0] != key:
            both = [self._like(name, prompt) for name in ("background", "foreground")]
            self._text = key, torch.cat(both, dim=1)  # one tensor for all steps: its keys may be remembered
        self._forward = forward
        self.prompted[forward.step.step] += 1
        return {self._input: self._text[1]}

    def _like(self, name: str, prompt: Tensor) -> Tensor:
        text: Tensor = getattr(self.regions, name)
        if text.shape[1:] != prompt.shape[1:] or text.shape[0] not in (1, prompt.shape[0]):
            raise ValueError(
                f"regions: {name} is {list(text.shape)}, but the transformer is called with a prompt of "
                f"{list(prompt.shape)}; encode it alike"
            )
        return text.to(prompt.device, prompt.dtype).expand(prompt.shape[0], -1, -1)

    def splits(self, forward: Forward) -> bool:
        """Whether a forward reads two prompts."""
        return self._forward is forward

    def cross(self, attend: Callable[[Tensor, Tensor], Tensor], rows: Tensor, text: Tensor, forward: Forward) -> Tensor:
        """Cross-attention in which the box reads the foreground prompt and all else the background prompt.

        A row of cross-attention knows nothing of other rows: the two kinds are two calls, each with its own keys.

        Args:
            attend: the module, ``attend(rows, text)``.
            rows: [B, N, C], or the own rows of a rank that shares the sequence.
            text: [B, image + 2 S, C], background then foreground last.
        """
        assert self.regions.foreground is not None
        words = self.regions.foreground.shape[1]
        geometry, shard = forward.geometry, forward.shard
        first = 0 if shard is None else shard.start
        whole = rows.shape[1] if shard is None or shard.rows != rows.shape[1] else shard.total
        if geometry is None or whole != geometry.n_video:
            raise RuntimeError(
                f"regions: cross-attention has {rows.shape[1]} rows, which are not the tokens of the video; run whole "
                "videos, without a subset of tokens"
            )
        image = text[:, : text.shape[1] - 2 * words]
        out: Tensor | None = None
        prompts = text[:, image.shape[1] :].split(words, dim=1)
        places = self._places(geometry.grid, first, rows.shape[1], rows.device)
        for chosen, own in zip(places, prompts, strict=True):
            if not len(chosen):
                continue
            part = attend(rows[:, chosen], torch.cat((image, own), dim=1) if image.shape[1] else own)
            if out is None:
                out = part.new_empty(*rows.shape[:2], part.shape[-1])
            out[:, chosen] = part
        assert out is not None
        return out

    def _places(
        self, grid: tuple[int, int, int], first: int, count: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Of so many tokens from the first on, those outside and inside of the box."""
        key = grid, first, count, device
        if key not in self._rows:
            inside = box_rows(grid, self.regions.boxes)[first : first + count]
            outer, inner = ((inside == kind).nonzero().flatten().to(device) for kind in (False, True))
            self._rows[key] = outer, inner
        return self._rows[key]
