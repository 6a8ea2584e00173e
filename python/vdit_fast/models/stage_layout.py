"""What lies around a family's blocks, for ranks that have only some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vdit_fast.models.qk import Rotary

__all__ = ["StageLayout", "volume_of"]

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class StageLayout:
    """For families whose blocks change one stream, [B, video tokens, C], and get the same other arguments."""

    models: tuple[str, ...]
    """Class names of the transformers that this is true of."""
    patch: str
    """Path of the module that makes the stream of the latents; it runs on the first rank only."""
    embedders: tuple[str, ...]
    """Paths of the modules that see the timestep and the constant arguments but no latents: their outputs at every step
    are made once, on the first rank."""
    patched: Callable[[Tensor, Grid], Tensor]
    """The stream on a grid of tokens in the form in which ``patch`` returns it."""
    later_rotary: Callable[[Any, Tensor, int], Rotary]
    """(transformer, latents of a longer clip, first token) -> the rotation of its tokens from there on."""


def volume_of(stream: Tensor, grid: Grid) -> Tensor:
    """[B, N, C] as a convolution over patches returns it: [B, C, F, H, W], without a copy."""
    return stream.transpose(1, 2).unflatten(2, grid)
