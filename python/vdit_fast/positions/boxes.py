"""Object boxes that move over the frames: their tokens take the positions of one anchor box (DiTraj, arXiv 2509.21839).

For the first steps, attention then sees an object that stands still, and draws it in every frame's box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ids import check_grid
from .tables import take_rows

if TYPE_CHECKING:
    from vdit_fast.context import StepContext
    from vdit_fast.models.session import Geometry

__all__ = ["AnchoredBoxes", "anchored_rows", "box_rows", "check_steps", "early"]

Box = Sequence[int]
"""(top, left, bottom, right) in tokens; bottom and right are the first ones outside."""


def _check_boxes(boxes: Sequence[Box], grid: tuple[int, int, int]) -> Tensor:
    """int64 [F, 4] on the CPU, every box inside its frame and large enough to have an inside."""
    frames, height, width = check_grid(grid)
    if isinstance(boxes, Tensor) and boxes.device.type != "cpu":
        raise TypeError(f"boxes lie on {boxes.device}: they are read on the host, pass a list or a CPU tensor")
    table = torch.as_tensor(boxes)
    if table.shape != (frames, 4) or table.is_floating_point() or table.dtype == torch.bool:
        raise ValueError(
            f"boxes must be {frames} integer quadruples (top, left, bottom, right), one per latent frame of grid "
            f"{tuple(grid)}, got {table.dtype} {tuple(table.shape)}"
        )
    for frame, (top, left, bottom, right) in enumerate(table.tolist()):
        if not (0 <= top < bottom - 1 < height and 0 <= left < right - 1 < width):
            raise ValueError(
                f"boxes[{frame}] = {(top, left, bottom, right)} must lie in the {height} x {width} tokens of a frame "
                "and be at least 2 high and 2 wide"
            )
    return table.long()


def anchored_rows(grid: tuple[int, int, int], boxes: Sequence[Box], *, device: torch.device | str = "cpu") -> Tensor:
    """Whose position every token takes: inside its frame's box the anchor box's token, elsewhere its own.

    The anchor is the smallest box (the first of equals). A box of another size takes the anchor's rows and columns by
    nearest neighbours, corner to corner; ties go to the even one. Tokens stay in their frame, so their temporal
    position is kept. The last row and the last column of a box keep their own positions, as in the code that the
    authors' method is known from. Boxes that are the same in all frames change nothing.

    Args:
        grid: (frames, height, width) in tokens.
        boxes: (top, left, bottom, right) for each latent frame, in tokens, bottom and right exclusive; a list or an
            integer CPU tensor [frames, 4].

    Returns:
        int64 [N]: ``grid_ids(grid)[rows]`` are the ids, ``take_rows(tables, rows)`` the tables of any model.

    Raises:
        TypeError, ValueError: boxes of another number, outside their frame, or less than 2 tokens high or wide.
    """
    table = _check_boxes(boxes, grid)
    frames, height, width = grid
    sizes = table[:, 2:] - table[:, :2] - 1  # rows and columns that move
    areas = sizes.prod(1).tolist()
    anchor = areas.index(min(areas))
    places = [
        _nearest(torch.arange(count), table[:, axis, None], sizes[:, axis, None], anchor)
        for axis, count in enumerate((height, width))
    ]
    (rows, in_rows), (columns, in_columns) = places
    frame = torch.arange(frames).view(-1, 1, 1)
    own = torch.arange(frames * height * width).view(frames, height, width)
    taken = (frame * height + rows[:, :, None]) * width + columns[:, None, :]
    return torch.where(in_rows[:, :, None] & in_columns[:, None, :], taken, own).flatten().to(device)


def box_rows(grid: tuple[int, int, int], boxes: Sequence[Box]) -> Tensor:
    """bool [N] on the CPU: which tokens lie in their frame's box, its last row and column included."""
    table = _check_boxes(boxes, grid)
    rows, columns = (
        (torch.arange(size) >= table[:, axis, None]) & (torch.arange(size) < table[:, axis + 2, None])
        for axis, size in enumerate(grid[1:])
    )
    return (rows[:, :, None] & columns[:, None, :]).flatten()


def check_steps(name: str, steps: int | float) -> None:
    """Raise unless it is a number of steps or a fraction of them."""
    if isinstance(steps, bool) or not isinstance(steps, int | float):
        raise TypeError(f"{name} must be an int (number of steps) or a float in [0, 1), got {steps!r}")
    if not (math.isfinite(steps) and steps >= 0) or (isinstance(steps, float) and steps >= 1):
        raise ValueError(f"{name} must be an int of at least 0 or a float in [0, 1), got {steps!r}")


def early(who: str, name: str, steps: int | float, step: StepContext) -> bool:
    """Whether a step is one of the first ``steps``. Raises RuntimeError where that cannot be told."""
    if step.step < 0:
        raise RuntimeError(f"{who}: the denoising step is unknown; pass the transformer its timestep")
    if isinstance(steps, int):
        return step.step < steps
    if step.num_steps is None:
        raise RuntimeError(
            f"{who}: {name} {steps} is a fraction but the number of steps is unknown; give a number of steps, or "
            "accelerate the pipeline instead of the transformer"
        )
    return step.step < math.floor(steps * step.num_steps + 1e-9)  # 0.29 * 100 is 28.999999999999996 in binary


def _nearest(index: Tensor, first: Tensor, size: Tensor, anchor: int) -> tuple[Tensor, Tensor]:
    """For every frame and coordinate of one axis: the anchor's coordinate, and whether the box covers it.

    In float64, where a quotient of small integers is a tie exactly when it is one.
    """
    offset = index - first
    steps = (size - 1).clamp(min=1)
    scaled = (offset * (size[anchor] - 1)).double() / steps.double()
    return first[anchor] + scaled.round().long(), (offset >= 0) & (offset < size)


@dataclass(frozen=True, eq=False)
class AnchoredBoxes:
    """DiTraj's positions for ``Handle.positions``: anchored boxes in the first steps, the model's own afterwards.

    Attributes:
        boxes: as in ``anchored_rows``.
        steps: an int n: the first n denoising steps; a float in [0, 1): the first floor(steps * num_steps). The paper's
            5 of 50 by default.

    Raises:
        TypeError, ValueError: ``steps`` is neither.
        RuntimeError: at a call, when the denoising step, or for a fraction the number of steps, is unknown.
    """

    boxes: Sequence[Box]
    steps: int | float = 0.1

    def __post_init__(self) -> None:
        check_steps("steps", self.steps)

    def phase(self, step: StepContext) -> bool:
        """Whether a step is one of those with anchored boxes: feature caches forecast nothing over their end."""
        return early("AnchoredBoxes", "steps", self.steps, step)

    def __call__(
        self, step: StepContext, geometry: Geometry, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The tables of this forward, None for the model's own."""
        if not self.phase(step):
            return None
        return take_rows(tables, anchored_rows(geometry.grid, self.boxes, device=tables[0].device))
