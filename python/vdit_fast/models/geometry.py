"""Where a transformer's tokens lie: video, text, and what else is in the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Geometry", "Volume", "level_grid"]

Volume = tuple[int, int, int, int]
"""(batch, frames, height, width) in tokens of the finest level."""


@dataclass(frozen=True)
class Geometry:
    """Token layout of one forward."""

    grid: tuple[int, int, int]
    """(frames, height, width) in tokens."""
    text: int | None = 0
    """Text tokens in the joint sequence; None: whatever the sequence holds beyond history and video."""
    text_first: bool = False
    history: int = 0
    """Tokens of earlier clips before the video (text last). Planners see them behind it, as further text tokens:
    read by every query and reading every key."""
    frame_block: int = 0
    """Frames per block where a block-causal mask comes with the calls, else 0."""

    @property
    def n_video(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    def video_first(self, x: Tensor) -> Tensor:
        """x [B, N, H, D] with the history behind the video; the text stays last."""
        end = self.history + self.n_video
        return torch.cat((x[:, self.history : end], x[:, : self.history], x[:, end:]), dim=1)

    def in_model_order(self, x: Tensor) -> Tensor:
        """Undoes ``video_first``."""
        end = self.history + self.n_video
        return torch.cat((x[:, self.n_video : end], x[:, : self.n_video], x[:, end:]), dim=1)


def level_grid(volume: Volume | None, over: str, sequences: int, rows: int) -> tuple[int, int, int] | None:
    """The token grid that factorised attention over ``sequences`` of ``rows`` each works on, None when unknown.

    A UNet halves height and width from level to level, rounding up.

    Args:
        over: "frames", one sequence per place, or "frame", one sequence per frame.
    """
    if volume is None:
        return None
    batch, frames, height, width = volume
    while True:
        places = height * width
        if (sequences, rows) == ((batch * places, frames) if over == "frames" else (batch * frames, places)):
            return frames, height, width
        if places == 1:
            return None
        height, width = -(-height // 2), -(-width // 2)
