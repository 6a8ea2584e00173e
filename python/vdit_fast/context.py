"""Where in a denoising run, and where in a model, one attention call happens.

Both objects are plain data: planners read them, the accelerate layer fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["LayerContext", "StepContext"]


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
    static: dict[Any, Any] = field(default_factory=dict)
    """Like ``state``, for what follows from the planner's settings and the geometry alone: it outlives generations."""

    @property
    def num_tokens(self) -> int:
        """Length of the joint sequence."""
        return self.n_video + self.text

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
