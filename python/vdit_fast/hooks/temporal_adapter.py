"""Temporal convolutions beside self-attention (DeT)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from vdit_fast.context import StepContext
from vdit_fast.models.hooks import HookPlace, HookRows

__all__ = ["TemporalAdapter"]


class TemporalAdapter(nn.Module):
    """Two convolutions over the frames of every place, in parallel with self-attention (DeT, arXiv 2503.17350).

    ``out(gelu(in(x)))`` of attention's input, the video's rows after norm and modulation, is added to attention's
    output. Without bias and with "same" padding; two kernels of 3 see five frames. The second convolution begins at
    zero. Each layer has an adapter of its own: ``handle.hook("attention_output", adapter, layers=i)``.

    Args:
        channels: C of the rows.
        width: channels between the convolutions.
        kernel: frames that one convolution sees; odd.

    ``conv_in.weight`` is [width, C, kernel] and ``conv_out.weight`` [C, width, kernel], as ``torch.nn.Conv1d`` has
    them. The token grid comes from the model; a layer that sees one frame at a time is a ValueError.
    """

    where: ClassVar[str] = "attention_output"

    def __init__(self, channels: int, width: int = 128, kernel: int = 3) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("kernel", kernel)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that every frame has as many before it as behind, got {kernel}")
        self.conv_in = nn.Conv1d(channels, width, kernel, padding="same", bias=False)
        self.conv_out = nn.Conv1d(width, channels, kernel, padding="same", bias=False)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, step: StepContext, place: HookPlace, rows: HookRows) -> Tensor:
        if place.over == "frame":
            raise ValueError(f"TemporalAdapter: {place.name} sees one frame at a time; hook the temporal layers")
        if rows.video_input is None or rows.video.ndim != 3:
            raise ValueError(f"TemporalAdapter: {place.name} has no rows [B, N, C] with an input of the same kind")
        x = rows.video_input
        if place.over == "video":
            if place.grid is None:
                raise ValueError(f"TemporalAdapter: the token grid of {place.name} is unknown")
            x = x.unflatten(1, (place.grid[0], -1))
        else:
            x = x.unsqueeze(2)
        return rows.video + self.features(x).reshape(rows.video.shape)

    def features(self, x: Tensor) -> Tensor:
        """[B, frames, places, C] -> the same shape. The convolutions are one matrix product each in the tokens' own
        order, where a Conv1d would want them transposed."""
        first, second = self.conv_in.weight, self.conv_out.weight
        frames, kernel = x.shape[1], first.shape[2]
        taps = functional.linear(x, first.permute(2, 0, 1).flatten(0, 1)).unflatten(-1, (kernel, -1))
        taps = _beyond(taps, kernel // 2)
        summed = torch.stack([taps[:, tap : tap + frames, :, tap] for tap in range(kernel)]).sum(0)
        hidden = _beyond(functional.gelu(summed), kernel // 2)
        gathered = torch.cat([hidden[:, tap : tap + frames] for tap in range(kernel)], dim=-1)
        return functional.linear(gathered, second.permute(0, 2, 1).flatten(1))


def _beyond(x: Tensor, reach: int) -> Tensor:
    """x [B, F, ...] with ``reach`` frames of zeros at either end."""
    zeros = x.new_zeros(x.shape[0], reach, *x.shape[2:])
    return torch.cat((zeros, x, zeros), dim=1)
