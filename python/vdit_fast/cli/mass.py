"""Where the attention of a head lies: exact weights of sampled queries, the best possible selection, a plan's share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdit_fast import ops
from vdit_fast.plan.rows import plan_rows
from vdit_fast.planners._sampling import sample

if TYPE_CHECKING:
    from vdit_fast.context import LayerContext
    from vdit_fast.plan import AttentionPlan

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
WINDOW = 0.25
"""Share of the video that the windows of ``character`` hold."""
LIFT = 1.5
"""Mass in a window, relative to uniform attention, from which a head is called spatial or temporal."""


def sample_rows(ctx: LayerContext, count: int, device: torch.device | str) -> Tensor:
    """Video queries spread by golden-ratio steps: int64 ``[<= count]``, joint-sequence indices."""
    return sample(count, ctx.n_video, device) + ctx.video_slice.start


@dataclass(frozen=True)
class Weights:
    """Exact attention weights of sampled queries of one head.

    Attributes:
        rows: int64 ``[R]``, the queries.
        weight: float32 ``[R, N]``, rows sum to 1; padding keys have weight 0.
    """

    batch: int
    head: int
    rows: Tensor
    weight: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, ctx: LayerContext, rows: Tensor, *, batch: int, head: int) -> Weights:
        """Weights of q ``[B, N, H, D]``, k ``[B, N, Hkv, D]``."""
        group = q.shape[2] // k.shape[2]
        scores = q[batch, rows, head].float() @ k[batch, :, head // group].float().mT * q.shape[-1] ** -0.5
        if ctx.kv_len is not None:
            padding = torch.arange(k.shape[1], device=k.device) >= ctx.kv_len[batch]
            scores = scores.masked_fill(padding, -torch.inf)
        return cls(batch, head, rows, scores.softmax(-1))

    def best(self, densities: Sequence[float]) -> list[float]:
        """Mass held by the largest entries: no selection of that many query-key pairs of these rows holds more."""
        return _best(self.weight, densities, self.weight.shape[0])

    def kept(self, plan: AttentionPlan) -> tuple[float, float]:
        """(density, mass) of what a plan reads of these rows."""
        mask = plan_rows(plan, self.rows, batch=self.batch, head=self.head)
        mass = torch.where(mask, self.weight, 0.0).sum() / self.weight.shape[0]
        return float(mask.float().mean()), float(mass)

    def character(self, ctx: LayerContext) -> tuple[float, float]:
        """Mass in the nearest frames and at the nearest places, over that of uniform attention over the video.

        Both windows hold about ``WINDOW`` of the video: whole frames, or a part of every frame; moved inside at the
        borders.
        """
        frames, height, width = ctx.grid
        at = self.rows - ctx.video_slice.start
        side = math.sqrt(WINDOW)
        t = _band(at // (height * width), frames, max(1, round(WINDOW * frames)))
        y = _band(at // width % height, height, max(1, round(side * height)))
        x = _band(at % width, width, max(1, round(side * width)))
        video = self.weight[:, ctx.video_slice].unflatten(1, tuple(ctx.grid))
        total = video.sum().clamp(min=1e-30)
        near_frames = torch.einsum("rtyx,rt->", video, t) / total / t.mean()
        near_places = torch.einsum("rtyx,ry,rx->", video, y, x) / total / (y.mean() * x.mean())
        return float(near_frames), float(near_places)

    def text(self, ctx: LayerContext) -> float:
        """Mass on the text tokens."""
        return float(self.weight[:, ctx.text_slice].sum() / self.weight.shape[0])


def best_blocks(
    q: Tensor, k: Tensor, ctx: LayerContext, densities: Sequence[float], *, block: int, count: int
) -> list[list[list[float]]]:
    """Mass held by the best key blocks of ``count`` sampled query blocks of consecutive tokens: ``[B][H][densities]``.

    What a method can reach that selects square blocks in the model's own token order, if it knew the answer.
    """
    blocks = max(1, ctx.n_video // block)
    picked = sorted({int(i) for i in torch.linspace(0, blocks - 1, min(count, blocks)).round().tolist()})
    first = ctx.video_slice.start
    index = torch.tensor([first + b * block for b in picked], device=q.device)[:, None]
    size = min(block, ctx.n_video)
    rows = q.index_select(1, (index + torch.arange(size, device=q.device)).flatten())
    lse = ops.score_lse(rows, k, kv_len=ctx.kv_len)
    mass = ops.block_mass(rows, k, lse, size, block, kv_len=ctx.kv_len) / size
    return [[_best(m, densities, len(picked)) for m in item] for item in mass.unbind(0)]


def label(near_frames: float, near_places: float) -> str:
    """``spatial``, ``temporal`` or ``global``, from the two numbers of ``character``."""
    if max(near_frames, near_places) < LIFT:
        return "global"
    return "spatial" if near_frames >= near_places else "temporal"


def _best(entries: Tensor, densities: Sequence[float], rows: int) -> list[float]:
    """Sums of the largest shares of ``entries``, between whole entries linearly, divided by ``rows``."""
    top = entries.flatten().sort(descending=True).values.double().cumsum(0)
    top = torch.nn.functional.pad(top, (1, 0))
    place = torch.tensor(densities, dtype=torch.float64, device=top.device) * entries.numel()
    low = place.floor().long().clamp(max=entries.numel())
    high = (low + 1).clamp(max=entries.numel())
    return ((top[low] + (top[high] - top[low]) * (place - low)) / rows).tolist()


def _band(at: Tensor, length: int, width: int) -> Tensor:
    """float32 ``[R, length]``: 1 for the ``width`` nearest places of each, moved inside at the borders."""
    start = (at - width // 2).clamp(0, length - width)[:, None]
    index = torch.arange(length, device=at.device)
    return ((index >= start) & (index < start + width)).float()
