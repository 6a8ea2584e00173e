"""Patterns with a closed form: 3-D windows over a token grid and block-causal order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .args import cut, positive
from .builders import compile_map
from .plan import AttentionPlan

Triple = tuple[int, int, int]
MAX_CELLS = 2**14  # the map of cells has this number squared entries


def windows3d(
    grid: Triple,
    window: Triple,
    *,
    tile: Triple = (6, 8, 8),
    shift: Triple = (0, 0, 0),
    mode: Literal["sliding", "partition"] = "sliding",
    text: int = 0,
    text_first: bool = False,
    q_tile: int = 128,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Local windows on a grid of ``F x h x w`` video tokens (raster order), with dense text rows and columns.

    Args:
        grid: frames, height, width in tokens.
        window: window size in tokens; a size beyond the grid means the whole axis.
        tile: sliding mode only: tokens are regrouped into tiles of this size (the last one per axis may be smaller)
            and the window is rounded up to whole tiles. A query tile reads the window of tiles around it; at the
            borders the window is moved inside, so that every query reads the same number of tiles (Sliding Tile
            Attention, arXiv 2502.04507). An even count of tiles reaches one tile further back than ahead.
        shift: partition mode only: the borders between windows lie at ``shift + k * window``, without wrapping
            around, so the first and the last window of an axis may be smaller. 0 <= shift < window.
        mode: "sliding", or "partition": the grid is cut into windows and each attends to itself (StreamDiT, arXiv
            2507.03745).
        text: number of text tokens; they read and are read by everything.
        text_first: the text comes before the video tokens, not after them.
        q_tile: most rows per tile of the plan.

    Returns:
        A plan of shape ``(1, 1, L, L)``, L = F * h * w + text, with tokens permuted window by window.
    """
    for name, triple in (("grid", grid), ("window", window), ("tile", tile)):
        if len(triple) != 3:
            raise ValueError(f"{name} must be three sizes (frames, height, width), got {triple!r}")
        for axis in range(3):
            positive(f"{name}[{axis}]", triple[axis])
    if len(shift) != 3 or any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift must be three numbers with 0 <= shift < window, got {shift!r} for window {window!r}")
    if isinstance(text, bool) or not isinstance(text, int) or text < 0:
        raise ValueError(f"text must be a number of tokens, 0 or more, got {text!r}")
    positive("q_tile", q_tile)

    if mode == "sliding":
        if any(shift):
            raise ValueError(f"shift = {shift!r} has a meaning in mode 'partition' only; use (0, 0, 0)")
        sizes = [cut(n, t) for n, t in zip(grid, tile, strict=True)]
        reads = [_sliding_axis(len(s), -(-w // t)) for s, w, t in zip(sizes, window, tile, strict=True)]
    elif mode == "partition":
        sizes = [_partition_axis(n, w, s) for n, w, s in zip(grid, window, shift, strict=True)]
        reads = [torch.eye(len(s), dtype=torch.bool) for s in sizes]
    else:
        raise ValueError(f"mode must be 'sliding' or 'partition', got {mode!r}")

    cells = len(sizes[0]) * len(sizes[1]) * len(sizes[2])
    if cells > MAX_CELLS:
        name = "tile" if mode == "sliding" else "window"
        raise ValueError(f"{name} cuts the grid into {cells} cells, more than {MAX_CELLS}; use a larger {name}")
    order, lengths = _grid_order(sizes)
    keep = _outer(reads)
    if text:
        keep = torch.nn.functional.pad(keep, (1, 0, 1, 0) if text_first else (0, 1, 0, 1), value=True)
        words = torch.arange(text)
        if text_first:
            order, lengths = torch.cat((words, order + text)), torch.cat((torch.tensor([text]), lengths))
        else:
            order, lengths = torch.cat((order, words + len(order))), torch.cat((lengths, torch.tensor([text])))
    length = len(order)
    tokens = order.to(torch.int32).view(1, 1, length)
    plan = compile_map(keep[None, None], lengths[None], lengths[None], length, length, tokens, tokens, q_tile=q_tile)
    return plan if device is None else plan.to(device)


def block_causal(
    block_sizes: Sequence[int],
    *,
    window: int | None = None,
    sinks: int = 0,
    full: int = 0,
    q_tile: int = 128,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Causal over blocks (frames or chunks), full inside a block.

    Block ``i`` reads blocks ``max(0, i - window + 1) .. i`` (all earlier ones when ``window`` is None) and those of
    the first ``sinks`` blocks that do not come after it, as a rolling key/value cache with sinks does (CausVid, arXiv
    2412.07772; Self Forcing, arXiv 2506.08009).

    Args:
        block_sizes: tokens per block, zero allowed.
        window: blocks a block may read, itself included; at least 1.
        sinks: leading blocks that stay visible.
        full: leading blocks that read and are read by all: context before the frames (AR-Diffusion, arXiv 2503.07418).
        q_tile: most rows per tile of the plan.
    """
    sizes = list(block_sizes)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in sizes) or sum(sizes) < 1:
        raise ValueError(f"block_sizes must be token counts of 0 or more with at least one token in all, got {sizes!r}")
    if window is not None:
        positive("window", window)
    for name, value in (("sinks", sinks), ("full", full)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a number of blocks, 0 or more, got {value!r}")
    positive("q_tile", q_tile)
    index = torch.arange(len(sizes))
    behind = index[:, None] - index[None, :]
    keep = behind >= 0
    if window is not None:
        keep &= (behind < window) | (index < sinks)[None, :]
    keep |= (index < full)[:, None] | (index < full)[None, :]
    lengths = torch.tensor(sizes)[None]
    plan = compile_map(keep[None, None], lengths, lengths, sum(sizes), sum(sizes), q_tile=q_tile)
    return plan if device is None else plan.to(device)


def _sliding_axis(tiles: int, window: int) -> Tensor:
    """Which tiles of an axis each tile reads: bool ``[tiles, tiles]``, ``min(window, tiles)`` per row."""
    window = min(window, tiles)
    index = torch.arange(tiles)
    first = (index - window // 2).clamp(0, tiles - window)
    ahead = index[None, :] - first[:, None]
    return (ahead >= 0) & (ahead < window)


def _partition_axis(length: int, window: int, shift: int) -> list[int]:
    """Window lengths along an axis with borders at ``shift + k * window``."""
    borders = [b for b in range(shift, length, window) if b > 0]
    return [end - start for start, end in zip([0, *borders], [*borders, length], strict=True)]


def _outer(reads: list[Tensor]) -> Tensor:
    """Combine three per-axis maps ``[n, n]`` into one of the cells in raster order."""
    f, h, w = reads
    cells = len(f) * len(h) * len(w)
    joint = f[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    return joint.reshape(cells, cells)


def _grid_order(sizes: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Raster tokens sorted by cell (raster inside a cell), and the tokens per cell, both int64."""
    cell = torch.zeros(1, 1, 1, dtype=torch.int64)
    count = torch.ones(1, 1, 1, dtype=torch.int64)
    for axis, lengths in enumerate(sizes):
        shape = [1, 1, 1]
        shape[axis] = -1
        n = torch.tensor(lengths)
        of_token = torch.repeat_interleave(torch.arange(len(lengths)), n)
        cell = cell * len(lengths) + of_token.view(shape)
        count = count * n.view(shape)
    return cell.reshape(-1).argsort(stable=True), count.reshape(-1)
