"""DiT-Mem's memory encoder: retrieved videos -> memory rows, once per clip (arXiv 2511.19229)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from vdit_fast.models.kernels import over_plan

__all__ = ["MemoryEncoder", "RadialFilter", "radial_gain"]

Band = Literal["high", "low"]
SLOPES, OFFSETS, GAINS = (0.7, 1.3), (-0.05, 0.05), (0.1, 1.2)


def radial_gain(radius: Tensor, band: Band) -> Tensor:
    """0.2 + 0.8·√f (high) or 1.2 − 0.8·√f (low) of a normalised radius f in [0, 1]."""
    if band not in ("high", "low"):
        raise ValueError(f"band must be 'high' or 'low', got {band!r}")
    root = radius.sqrt()
    return 0.2 + 0.8 * root if band == "high" else 1.2 - 0.8 * root


class RadialFilter(nn.Module):
    """Scales a real FFT by a fixed gain per channel and radius, and adds the input under a batch norm.

    Channel c has the gain clamp(s_c · g(f) + o_c, 0.1, 1.2), slopes s from 0.7 to 1.3 and offsets o from −0.05 to 0.05
    over the channels. The radius is that of the authors' code: indices 0 … n − 1 of every axis count as frequencies
    0 … 1, also where the FFT has negative ones behind the middle. Their checkpoints hold the gain with noise, its
    imaginary part included; ``gain`` takes it.

    Args:
        channels: C.
        size: (frames, height, width) of what comes in.
        band: "high" or "low".
        dropout: of the filtered part.
    """

    gain: Tensor
    """fp32 [C, frames, height, width // 2 + 1, 2], whatever the module is cast to."""

    def __init__(self, channels: int, size: tuple[int, int, int], band: Band, dropout: float = 0.5) -> None:
        super().__init__()
        self.size = size
        axes = [torch.linspace(0, 1, n) for n in (size[0], size[1], size[2] // 2 + 1)]
        squares = sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij"))
        assert isinstance(squares, Tensor)
        curve = radial_gain(squares.sqrt() / math.sqrt(3), band)
        slope, offset = (torch.linspace(*ends, channels).view(-1, 1, 1, 1) for ends in (SLOPES, OFFSETS))
        gain = (slope * curve + offset).clamp(*GAINS)
        self.register_buffer("gain", torch.stack([gain, torch.zeros_like(gain)], dim=-1))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm3d(channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        gain = self.gain
        super()._apply(fn, recurse)
        self.gain = gain.to(self.gain.device)  # no cast, which would round it
        return self

    def filtered(self, x: Tensor) -> Tensor:
        """x [B, C, frames, height, width] by gain · FFT, orthonormal, computed in fp32."""
        spectrum = torch.fft.rfftn(x.float(), dim=(2, 3, 4), norm="ortho") * torch.view_as_complex(self.gain)
        return torch.fft.irfftn(spectrum, s=self.size, dim=(2, 3, 4), norm="ortho").to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.dropout(self.filtered(x)) + x)
        return normed


class _Branch(nn.Module):
    """Latents of videos -> tokens of one band: two filtered convolutions, then the mean over stretches of frames."""

    def __init__(
        self, band: Band, channels: int, hidden: tuple[int, int], latent: tuple[int, int, int], tokens: int, width: int,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens = tokens
        layers: list[nn.Module] = []
        size = latent
        for number, (before, after, kernel, stride) in enumerate(
            ((channels, hidden[0], 7, 4), (hidden[0], hidden[1], 3, 1))
        ):
            size = (-(-size[0] // stride), -(-size[1] // stride), -(-size[2] // stride))
            if min(size) < 2:
                raise ValueError(
                    f"memory encoder: latents of {latent} leave {size} before pooling {number + 1} of 2; they need at "
                    "least (13, 13, 13)"
                )
            layers += [
                nn.Conv3d(before, after, kernel, stride, padding=kernel // 2),
                RadialFilter(after, size, band, dropout),
                nn.ReLU(),
                nn.MaxPool3d(2),
            ]
            size = (size[0] // 2, size[1] // 2, size[2] // 2)
        self.features = nn.Sequential(*layers)
        self.project = nn.Linear(hidden[1] * size[1] * size[2], width)

    def forward(self, videos: Tensor) -> Tensor:
        x = self.features(videos).transpose(1, 2).flatten(2)
        x = functional.adaptive_avg_pool1d(x.transpose(1, 2), self.tokens).transpose(1, 2)
        tokens: Tensor = self.project(x)
        return tokens


class _SelfAttention(nn.Module):
    """Without positions; RMSNorm of q and k over all heads' channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x))
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in heads)
        out: Tensor = self.to_out(over_plan(q, k, v, None, None, None).flatten(2))
        return out


class MemoryEncoder(nn.Module):
    """Memory rows of retrieved videos for ``Handle.memory``. At the published sizes it has 79 M parameters, as the
    authors' code builds it (their paper says 150 M).

    Args:
        channels: of the VAE's latents.
        latent: their (frames, height, width).
        tokens: per video and band.
        width: of the transformer's blocks.
        hidden: channels of the two convolutions.
        heads: of the self-attention that both bands share.
        dropout: of the filtered features.

    Raises:
        ValueError: sizes that leave nothing, or a width that the heads do not divide.
    """

    def __init__(
        self,
        channels: int = 16,
        latent: tuple[int, int, int] = (21, 60, 104),
        tokens: int = 100,
        width: int = 1536,
        hidden: tuple[int, int] = (512, 768),
        heads: int = 8,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "tokens": tokens, "width": width, "heads": heads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.channels, self.latent = channels, latent
        self.high, self.low = (
            _Branch(band, channels, hidden, latent, tokens, width, dropout) for band in ("high", "low")
        )
        self.attention = _SelfAttention(width, heads)

    def forward(self, videos: Tensor) -> Tensor:
        """Memory rows [B, V · 2 · tokens, width] of latents [B, V, channels, frames, height, width]: all high-pass
        tokens, video by video, then all low-pass ones."""
        if videos.ndim != 6 or tuple(videos.shape[2:]) != (self.channels, *self.latent):
            raise ValueError(
                f"memory encoder: latents are {list(videos.shape)}, expected [B, videos, {self.channels}, "
                f"{', '.join(map(str, self.latent))}]; make the encoder for this size"
            )
        flat = videos.flatten(0, 1)
        parts = (branch(flat).unflatten(0, videos.shape[:2]).flatten(1, 2) for branch in (self.high, self.low))
        return torch.cat([self.attention(part) for part in parts], dim=1)
