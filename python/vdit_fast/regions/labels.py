"""The class of every token under anchored boxes, and the attention plan that the classes mean (DiTraj)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdit_fast.plan import AttentionPlan
from vdit_fast.positions.boxes import Box, anchored_rows, box_rows

__all__ = ["CLASSES", "region_labels", "region_plan"]

CLASSES = ("other", "box", "redundant")
"""Outside of the box; inside; outside, at a position that an anchored token of the same frame has too."""


def region_labels(grid: tuple[int, int, int], boxes: Sequence[Box]) -> Tensor:
    """Index into ``CLASSES`` of every token while positions are anchored (arXiv 2509.21839).

    A box that has taken the anchor's positions has a twin: the tokens where the anchor's box would be, which still have
    those positions themselves. Attention would take them for the object. As in the code that the authors' method is
    known from, a token is redundant when it is outside of the box and any other token has its position.

    Args:
        grid: (frames, height, width) in tokens.
        boxes: as in ``positions.anchored_rows``.

    Returns:
        int64 [N] on the CPU. Boxes that stand still have no redundant tokens.
    """
    rows, inside = anchored_rows(grid, boxes), box_rows(grid, boxes)
    shared = torch.bincount(rows, minlength=len(rows))[rows] > 1
    return torch.where(inside, 1, torch.where(shared, 2, 0))


def region_plan(
    labels: Tensor, context: int = 0, *, first: int = 0, device: torch.device | str | None = None
) -> AttentionPlan | None:
    """Box tokens and redundant tokens do not read each other; everything else reads everything.

    Args:
        labels: of ``region_labels``.
        context: further rows of the sequence (text), which read and are read by all.
        first: how many of them stand before the video.

    Returns:
        the plan, None where nothing is forbidden.
    """
    if not bool((labels == 2).any()):
        return None
    whole = torch.nn.functional.pad(labels, (first, context - first))
    allow = torch.ones(3, 3, dtype=torch.bool)
    allow[1, 2] = allow[2, 1] = False
    plan = AttentionPlan.from_classes(allow, whole)
    return plan if device is None else plan.to(device)
