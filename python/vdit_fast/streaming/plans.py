"""Rows of pages, and what a chunk's queries read of them as an AttentionPlan, built from host integers."""

from __future__ import annotations

import torch
from torch import Tensor

from vdit_fast.caching.checks import count
from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.args import cut
from vdit_fast.streaming.pages import Ring, merged

__all__ = ["chunk_plan", "token_rows"]


def chunk_plan(ring: Ring, page: int, lq: int, causal: int, window: int | None, device: torch.device) -> AttentionPlan:
    """The plan of ``KVCache.plan``: lq queries over the rows of the slots held."""
    count("lq", lq, 1)
    count("causal", int(causal), 0)
    if window is not None:
        count("window", window, 1)
    tokens = ring.chunk * page
    if (causal or window is not None) and lq != tokens:
        raise ValueError(
            f"lq is {lq}, but the current chunk has {ring.chunk} frames of {page} tokens = {tokens}; with causal or "
            "window every query needs its frame"
        )
    first = ring.frames[-ring.chunk]
    blocks = cut(ring.chunk, int(causal)) if causal else [ring.chunk]
    lengths = [block * page for block in blocks] if causal else [lq]
    tiles: list[tuple[int, int, list[tuple[int, int]]]] = []
    end, start = first, 0
    for block, length in zip(blocks, lengths, strict=True):
        end += block
        oldest = end - window if window is not None else 0
        reads = [
            slot
            for frame, slot in zip(ring.frames, ring.slots, strict=True)
            if frame < end and (frame >= oldest or frame < ring.sinks)
        ]
        # One tile per block: executors cut long tiles, and count capacity by the number of tiles.
        tiles.append((start, length, [(slot * page, pages * page) for slot, pages in merged(reads)]))
        start += length
    tiles.sort(key=lambda tile: -tile[1] * sum(keys for _, keys in tile[2]))
    pointers = [0]
    for _, _, runs in tiles:
        pointers.append(pointers[-1] + len(runs))
    rows_of = [(0, start, rows) for start, rows, _ in tiles]
    runs_of = [(start, keys, -1) for _, _, runs in tiles for start, keys in runs]
    lists = [torch.tensor(values, dtype=torch.int32).to(device) for values in (rows_of, pointers, runs_of)]
    return AttentionPlan(1, 1, lq, len(ring.frames) * page, lists[0], lists[1], lists[2])


def token_rows(numbers: tuple[int, ...], page: int, device: torch.device) -> Tensor:
    """``number * page + place`` for all places of every page's number, int32."""
    place = torch.arange(page, dtype=torch.int32)
    return (torch.tensor(numbers, dtype=torch.int32)[:, None] * page + place).reshape(-1).to(device)
