"""Where in a denoising run, and where in a model, one attention call happens.

Both objects are plain data: planners read them, the accelerate layer fills them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

__all__ = ["HeadShard", "LayerContext", "StepContext"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class StepContext:
    """The place of one transformer call in a denoising run.

    ``step`` is the index in the scheduler's schedule when one is known, otherwise the number of distinct
    timesteps seen in this run; -1 means unknown. It is derived from the ``timestep`` argument, never counted
    from calls, so that CFG branches, partial ranges and repeated calls do not shift it.
    """

    step: int = -1
    """0-based step, -1 when unknown."""
    num_steps: int | None = None
    """Length of the schedule, None when no scheduler is known."""
    timestep: float | None = None
    """In the model's own units, usually 0..1000; the largest one for per-token timesteps."""
    sigma: float | None = None
    """Noise level in 0..1."""
    branch: int = 0
    """k-th transformer call at this timestep (split classifier-free guidance: 0 conditional, 1 unconditional)."""
    expert: str = "transformer"
    """Which of a pipeline's transformers is running."""
    generation: int = 0
    """Grows by one when a new denoising run begins."""
    frame_block: int | None = None
    """Index of the frame block in streaming generation, None otherwise."""
    branches: int = 1
    """Guidance branches of the generation that have calls of their own, as far as is known: those seen so far, or two
    where the pipeline says that it guides and its family calls once per branch."""

    @property
    def fraction(self) -> float | None:
        """``step / num_steps`` in [0, 1), None when either is unknown."""
        if self.step < 0 or not self.num_steps:
            return None
        return self.step / self.num_steps


@dataclass(frozen=True)
class HeadShard:
    """Which of a layer's heads a call has, where several ranks compute some of them each."""

    first: int
    """Number of the call's first query head in the model."""
    count: int
    total: int
    """Query heads of the model."""
    keys: tuple[int, ...]
    """The model's key head of each of the call's key heads."""
    kv_total: int
    gather: Callable[[torch.Tensor], torch.Tensor]
    """[B, count, ...] of the call's query heads -> [B, total, ...] of all: every rank of the group must call it."""

    def own(self, per_head: Sequence[Item]) -> Sequence[Item]:
        """The call's entries of a list with one per query head of the model."""
        return per_head[self.first : self.first + self.count]

    def own_keys(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """The call's key heads of all those of the model along a dimension."""
        first, count = self.keys[0], len(self.keys)
        if self.keys == tuple(range(first, first + count)):
            return x.narrow(dim, first, count)
        return x.index_select(dim, torch.tensor(self.keys, device=x.device))


@dataclass
class LayerContext:
    """The place of one attention call in a model.

    The joint sequence has ``n_video + text`` tokens; the video tokens are the row-major flattening of ``grid``.
    """

    layer: int
    """0-based index among the served attention layers of this transformer."""
    num_layers: int
    name: str
    """Module path of the attention layer inside the transformer."""
    grid: tuple[int, int, int]
    """(frames, height, width) of the video token grid."""
    n_video: int
    """frames * height * width."""
    text: int = 0
    """Number of text tokens in the joint sequence (0 for cross-attention models)."""
    text_first: bool = False
    """True when the text tokens come before the video tokens."""
    kv_len: torch.Tensor | None = None
    """int [batch]: keys at or after this position are padding; None when every key is valid."""
    step: StepContext = field(default_factory=StepContext)
    state: dict[Any, Any] = field(default_factory=dict)
    """One transformer's, survives steps, cleared when a new generation begins. The planner chooses the keys."""
    family: str = ""
    """The model family of the adapter that serves the layer; empty when unknown."""
    heads: HeadShard | None = None
    """Which heads q, k and v have, None when all of the layer's. What a planner has per head of the model it must take
    for these, and what it compares between heads it must gather."""
    static: dict[Any, Any] = field(default_factory=dict)
    """Like ``state``, for what follows from the planner's settings and the geometry alone: it outlives generations."""

    @property
    def num_tokens(self) -> int:
        """Length of the joint sequence."""
        return self.n_video + self.text

    def all_heads(self, here: int) -> int:
        """Query heads of the layer, of which a call has ``here``."""
        return here if self.heads is None else self.heads.total

    def own_heads(self, per_head: Sequence[Item]) -> Sequence[Item]:
        """The call's entries of a list with one per query head of the layer."""
        return per_head if self.heads is None else self.heads.own(per_head)

    @property
    def video_slice(self) -> slice:
        """The video tokens' positions in the joint sequence."""
        start = self.text if self.text_first else 0
        return slice(start, start + self.n_video)

    @property
    def text_slice(self) -> slice:
        """The text tokens' positions in the joint sequence; empty when ``text`` is 0."""
        start = 0 if self.text_first else self.n_video
        return slice(start, start + self.text)
