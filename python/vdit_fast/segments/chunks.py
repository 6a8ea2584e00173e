"""Overlapping chunks of a long clip, denoised side by side (Video Interface Networks, arXiv 2503.17539)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["Chunks", "denoise_chunks", "fusion_weights"]

FUSED = 0.6
"""Part of the schedule in which overlaps are fused: while t > 20 of 50."""


def fusion_weights(overlap: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Weights fp32 [overlap] of the chunk that ends, (w − i)/w, and of the one that begins, i/w; they sum to 1."""
    if overlap < 1:
        raise ValueError(f"overlap must be at least 1, got {overlap}")
    beginning = torch.arange(overlap, dtype=torch.float32, device=device) / overlap
    return 1 - beginning, beginning


@dataclass(frozen=True)
class Chunks:
    """How a clip is cut. A frame lies in at most two chunks.

    Attributes:
        frames: of the clip, in latents.
        length: of a chunk.
        overlap: frames that neighbours share, at most half of the length.

    Raises:
        ValueError: lengths that do not fit together; the message names the next ones that do.
    """

    frames: int
    length: int
    overlap: int

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= 2 * self.overlap <= self.length:
            raise ValueError(
                f"overlap must be 0 to half of a chunk's length, got overlap {self.overlap} and length {self.length}"
            )
        rest, shift = self.frames - self.length, self.length - self.overlap
        if rest < 0 or rest % shift:
            below, above = (self.length + shift * max(0, math.floor(rest / shift) + i) for i in (0, 1))
            raise ValueError(
                f"{self.frames} frames are not chunks of {self.length} that overlap by {self.overlap}; take {below} or "
                f"{above} frames"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """First frame of every chunk."""
        return tuple(range(0, self.frames - self.overlap, self.length - self.overlap))

    @property
    def count(self) -> int:
        return len(self.starts)

    def cut(self, x: Tensor, dim: int = 2) -> Tensor:
        """[B, …, frames, …] -> [count · B, …, length, …], chunk after chunk."""
        if x.shape[dim] != self.frames:
            raise ValueError(f"dimension {dim} has {x.shape[dim]} frames, the chunks are of a clip of {self.frames}")
        return torch.cat([x.narrow(dim, start, self.length) for start in self.starts])

    def fuse(self, parts: Tensor, dim: int = 2) -> Tensor:
        """The same chunks, in which both hold the weighted mean where they overlap."""
        self._check(parts, dim)
        pieces = list(parts.chunk(self.count))
        if not self.overlap:
            return parts.clone()
        for i in range(1, self.count):
            mean = self._mean(pieces[i - 1], pieces[i], dim)
            kept = self.length - self.overlap
            pieces[i - 1] = torch.cat([pieces[i - 1].narrow(dim, 0, kept), mean], dim)
            pieces[i] = torch.cat([mean, pieces[i].narrow(dim, self.overlap, kept)], dim)
        return torch.cat(pieces)

    def join(self, parts: Tensor, dim: int = 2) -> Tensor:
        """[count · B, …, length, …] -> [B, …, frames, …], the weighted mean where chunks overlap."""
        self._check(parts, dim)
        pieces = parts.chunk(self.count)
        found, inner = [], self.length - self.overlap
        for i, piece in enumerate(pieces):
            if i and self.overlap:
                found.append(self._mean(pieces[i - 1], piece, dim))
            first = self.overlap if i else 0
            last = inner if i < self.count - 1 else self.length
            found.append(piece.narrow(dim, first, last - first))
        return torch.cat(found, dim)

    def _mean(self, before: Tensor, after: Tensor, dim: int) -> Tensor:
        shape = [1] * before.ndim
        shape[dim] = -1
        ending, beginning = (w.view(shape) for w in fusion_weights(self.overlap, before.device))
        before, after = before.narrow(dim, self.length - self.overlap, self.overlap), after.narrow(dim, 0, self.overlap)
        return (before * ending + after * beginning).to(after.dtype)

    def _check(self, parts: Tensor, dim: int) -> None:
        if parts.shape[0] % self.count or parts.shape[dim] != self.length:
            raise ValueError(
                f"chunks are {list(parts.shape)}, expected {self.count} · batch of them with {self.length} frames in "
                f"dimension {dim}"
            )


def denoise_chunks(
    handle: Handle,
    latents: Tensor,
    timesteps: Sequence[Tensor] | Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    update: Callable[[Tensor, Tensor, Tensor], Tensor],
    chunks: Chunks,
    interface: Callable[[Tensor], Tensor] | None = None,
    fused: float | int = FUSED,
) -> Tensor:
    """Denoise all chunks of a clip as one batch. Every chunk reads its own tokens and the interface tokens Z, which are
    made of the whole noisy clip at every step and are one segment for all chunks (not copied where the clip's batch is
    1).

    Args:
        handle: of the transformer that ``predict`` calls; Z are its memory rows.
        latents: noise of the clip ``[B, C, frames, H, W]``.
        timesteps: of the schedule, most noise first; views of the scheduler's own tell the step without a host read.
        predict: ``predict(parts, timestep)``: the transformer's (guided) prediction for latents ``[count · B, C,
            length, H, W]`` and a timestep ``[count · B]`` of stride 0. Prompts must be repeated chunk after chunk.
        update: ``update(prediction, timestep, parts)``: the sampler's step, frame by frame.
        chunks: how the clip is cut.
        interface: ``interface(latents)`` of the whole noisy clip -> Z ``[1 or B, tokens, width of the blocks]``.
        fused: first steps after which overlaps are fused, a number or a fraction of the schedule.

    Returns:
        the clip ``[B, C, frames, H, W]``.

    Raises:
        ValueError: a clip or a setting that does not fit.
        RuntimeError: the handle has memory rows already, and what ``Handle.memory`` raises.
    """
    steps = len(timesteps)
    if isinstance(fused, bool) or fused < 0 or (isinstance(fused, float) and fused > 1):
        raise ValueError(f"fused must be a number of steps or a fraction in [0, 1], got {fused}")
    until = math.floor(fused * steps + 1e-9) if isinstance(fused, float) else fused
    if interface is not None and any("memory" in root.session.around for root in handle.roots):
        raise RuntimeError(
            "denoise_chunks: interface tokens are memory rows, and the handle has some; memory(None) first"
        )
    parts, rows = chunks.cut(latents), latents.new_empty(0)
    if interface is not None:
        handle.memory(lambda step: rows)
    try:
        for number, timestep in enumerate(timesteps):
            if interface is not None:
                rows = _for_chunks(interface(chunks.join(parts)), latents.shape[0], chunks.count)
            at = timestep.expand(parts.shape[0])
            parts = update(predict(parts, at), timestep, parts)
            if number < until:
                parts = chunks.fuse(parts)
    finally:
        if interface is not None:
            handle.memory(None)
    return chunks.join(parts)


def _for_chunks(rows: Tensor, batch: int, count: int) -> Tensor:
    """Z of every clip for all of its chunks; one clip's are shared as they are."""
    if rows.ndim != 3 or rows.shape[0] not in (1, batch):
        raise ValueError(f"denoise_chunks: interface tokens are {list(rows.shape)}, expected [1 or {batch}, tokens, C]")
    return rows if rows.shape[0] == 1 else rows.repeat(count, 1, 1)
