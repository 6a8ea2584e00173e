"""Radial attention: a static mask whose windows narrow as frames lie further apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._strips import strips
from ._tokens import cut
from .base import Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class Radial(Planner):
    """Radial Attention (Li et al., arXiv 2506.19852): attention decays with the distance in time, so windows do too.

    With fs tokens per frame, P the next power of two above fs, d the distance of two frames and g its bit length, a
    token reads in a frame at distance d the places at most w away from its own:
        w = fs for d ≤ 1, else max(decay · P / 2^g, block).
    When P / 2^g is less than a block, only every ⌊block · 2^g / P⌋-th distance d > 1 is read (thinning). This token
    mask becomes a block mask: a block is read when more than 60 % of its non-empty columns are filled in more than a
    third of their rows. The mask is one for all heads, layers and steps.

    Different from the authors' code: every frame is cut into blocks of its own, of at most `block` tokens and nearly
    equal, so that no block straddles a frame border and no number has to be divisible by 128; distances 0 and 1 are
    never thinned out (theirs can be in frames of less than 128 tokens); text may come first or last.

    Knobs besides those of `Planner`:
        decay: factor of the windows, 0 or more; the density grows with it.
        thinning: leave out distances as described above.
        block: most tokens per block.
        sinks: as in `Planner`, but 1 by default: the first frame is read by all, as in the authors' setting for Wan.

    The defaults are the authors' for Wan 2.1 (dense_steps 12, dense_layers 1 there); HunyuanVideo: decay 0.95, sinks
    0, dense_steps 12; Wan 2.2: decay 0.8.

    Raises:
        ValueError, TypeError: a bad knob.
    """

    name: ClassVar[str] = "radial"

    decay: float = 0.2
    thinning: bool = True
    block: int = 128
    sinks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("decay", _checks.number("decay", self.decay, least=0))
        self._set("thinning", _checks.switch("thinning", self.thinning))
        self._set("block", _checks.count("block", self.block, least=1))

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        from ..plan import AttentionPlan

        self.check_inputs(q, k, ctx)
        key = ("radial plan", self, tuple(ctx.grid), ctx.text, ctx.text_first, q.device)
        if key not in ctx.static:
            frames, height, width = ctx.grid
            with torch.inference_mode(False):
                blocks = strips(cut(height * width, self.block) * frames, ctx, self.sinks, q.device)
                mask = blocks.complete(self.mask(frames, height * width, q.device))
                ctx.static[key] = AttentionPlan.from_block_mask(
                    mask, blocks.lengths, blocks.lengths, lq=ctx.num_tokens, lk=ctx.num_tokens
                )
        plan: AttentionPlan = ctx.static[key]
        return plan

    def mask(self, frames: int, tokens: int, device: torch.device | str | None = None) -> Tensor:
        """The block mask of a video without text and sinks.

        Args:
            frames: number of frames.
            tokens: tokens per frame.
        Returns:
            bool [frames · n, frames · n] with n blocks per frame.
        """
        power = 1 << tokens.bit_length()
        length = [d.bit_length() for d in range(frames)]
        stride = [max(1, (self.block << g) // power) if self.thinning else 1 for g in length]
        read = torch.tensor([d <= 1 or d % s == 0 for d, s in enumerate(stride)], device=device)
        narrow = [max(self.decay * power / 2**g, self.block) for g in range(length[-1] + 1)]
        widths = [tokens if g <= 1 else int(min(w, tokens)) for g, w in enumerate(narrow)]

        maps = self._maps(tokens, torch.tensor(widths, device=device))
        frame = torch.arange(frames, device=device)
        distance = (frame[:, None] - frame).abs()
        pair = (maps[torch.tensor(length, device=device)] & read[:, None, None])[distance]  # [frames, frames, n, n]
        return pair.transpose(1, 2).flatten(2).flatten(0, 1)

    def _maps(self, tokens: int, widths: Tensor) -> Tensor:
        """Block maps of the bands |row − column| ≤ width of a frame pair: int [G] → bool [G, n, n]."""
        pieces = torch.tensor(cut(tokens, self.block), device=widths.device)
        end = pieces.cumsum(0)[:, None]
        start = end - pieces[:, None]
        column = torch.arange(tokens, device=widths.device)
        width = widths[:, None, None]
        # rows of each block that the band sets in each column, [G, n, tokens]
        rows = (torch.minimum(end, column + width + 1) - torch.maximum(start, column - width)).clamp(min=0)
        inside = ((column[:, None] >= start.mT) & (column[:, None] < end.mT)).float()
        nonempty, filled = ((m.float() @ inside).long() for m in (rows > 0, 3 * rows > pieces[:, None]))
        return 5 * filled > 3 * nonempty
