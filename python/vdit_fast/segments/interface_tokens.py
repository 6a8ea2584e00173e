"""Interface tokens: what a few hundred tokens make of a whole noisy clip (VINs, arXiv 2503.17539)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vdit_fast.models.kernels import over_plan

__all__ = ["InterfaceTokens"]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Queries of x [B, N, C], keys and values of the other rows [B, M, C]."""
        heads = (self.to_q(x), self.to_k(other), self.to_v(other))
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in heads)
        out: Tensor = self.to_out(over_plan(q, k, v, None, None, None).flatten(2))
        return out


class _Block(nn.Module):
    """Self-attention and feed-forward over [Z, text], each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h)
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class InterfaceTokens(nn.Module):
    """Z of a noisy clip: one cross-attention from learned tokens to its key frames, then self-attention with the text.

    The cost does not grow with the clip but for the key frames that are read once. What the paper does not say is
    chosen here: key frames are cut into patches with fixed sine positions (frame, row, column), norms stand before
    attention and feed-forward.

    Args:
        channels: of the latents.
        out_width: C of the blocks that read Z.
        text_width: of the text embeddings.
        tokens, width, heads, layers: of the module; the defaults are the paper's.
        patch: rows and columns of a patch.
        every: latent frames from one key frame to the next, one second in the paper.

    Raises:
        ValueError: a size below 1, or a width that the heads do not divide.
    """

    def __init__(
        self,
        channels: int,
        out_width: int,
        text_width: int,
        *,
        tokens: int = 512,
        width: int = 4096,
        heads: int = 32,
        layers: int = 4,
        patch: tuple[int, int] = (2, 2),
        every: int = 6,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "tokens": tokens, "heads": heads, "every": every, "patch": min(patch)}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if width % heads or width % 2:
            raise ValueError(f"width must be even and a multiple of heads, got {width} and {heads}")
        self.every = every
        self.patch = nn.Conv2d(channels, width, patch, patch)
        self.text = nn.Linear(text_width, width)
        self.tokens = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.norm_tokens, self.norm_frames, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.read = _Attention(width, heads)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, out_width)

    def key_frames(self, frames: int) -> list[int]:
        """Indices of the latent frames that are read."""
        return list(range(0, frames, self.every))

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Z [B, tokens, out_width] of a noisy clip [B, channels, frames, H, W] and its text [1 or B, T, text_width]."""
        batch, frames = latents.shape[0], self.key_frames(latents.shape[2])
        pictures = latents[:, :, :: self.every].transpose(1, 2).flatten(0, 1)
        x = self.patch(pictures)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2).unflatten(0, (batch, len(frames)))
        x = (x + _positions(frames, rows, columns, x)).flatten(1, 2)
        z = self.tokens.expand(batch, -1, -1)
        z = z + self.read(self.norm_tokens(z), self.norm_frames(x))
        joint = torch.cat([z, self.text(text).expand(batch, -1, -1)], dim=1)
        for block in self.blocks:
            joint = block(joint)
        out: Tensor = self.out(self.norm_out(joint[:, : self.tokens.shape[0]]))
        return out


def _positions(frames: list[int], rows: int, columns: int, like: Tensor) -> Tensor:
    """Sines and cosines of frame, row and column [key frames, rows · columns, C], each over all channels."""
    half = like.shape[-1] // 2
    frequency = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000.0) / half))

    def waves(place: Tensor) -> Tensor:
        angle = place[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    axes = (torch.tensor(frames, device=like.device), *(torch.arange(n, device=like.device) for n in (rows, columns)))
    time, height, width = (waves(axis.float()) for axis in axes)
    space = height[:, None] + width[None]
    return (time[:, None] + space.flatten(0, 1)).to(like.dtype)
