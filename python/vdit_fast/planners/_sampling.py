"""A short look at the attention of a few query rows: which tokens, and their scores against all keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2


def spread(count: int, total: int | Tensor, device: torch.device | str) -> Tensor:
    """`count` positions in 0 ... total − 1 in golden-ratio steps: as even as equal steps, never in phase with columns.

    All differ while count < 0.44 · total. An integer tensor `total` [..., 1] on the device gives int64 [..., count].
    """
    part = (torch.arange(count, device=device, dtype=torch.float64) + 0.5) * GOLDEN % 1.0
    return (part * total).long()


def sample(rows: int, n_video: int, device: torch.device | str) -> Tensor:
    """Video tokens to look at: int64, `rows` of them, or all when there are not more."""
    return torch.arange(n_video, device=device) if rows >= n_video else spread(rows, n_video, device)


def head_scores(q: Tensor, k: Tensor, kv_len: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Scaled scores of query rows q [B, R, H, D] against all keys k [B, N, Hkv, D], one key head at a time.

    One head at a time keeps the scores small. Yields the key head and fp32 [B, H / Hkv, R, N], −inf for padding keys.
    """
    heads, kv_heads, tokens = q.shape[2], k.shape[2], k.shape[1]
    rows = q.float() * q.shape[-1] ** -0.5
    padding = None
    if kv_len is not None:
        padding = torch.arange(tokens, device=q.device) >= kv_len.to(q.device).view(-1, 1, 1, 1)
    group = heads // kv_heads
    for j in range(kv_heads):
        scores = rows[:, :, j * group : (j + 1) * group].transpose(1, 2) @ k[:, None, :, j].float().mT
        yield j, scores if padding is None else scores.masked_fill(padding, -math.inf)
