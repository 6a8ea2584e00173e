"""The ids of boxes that take one anchor's positions, against a token-by-token reading of the rule."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from vdit_fast.context import StepContext
from vdit_fast.positions import AnchoredBoxes, anchored_rows, grid_ids

GRID = (4, 9, 11)
STILL = [(2, 3, 6, 8)] * 4
MOVING = [(0, 0, 4, 5), (2, 3, 6, 8), (3, 5, 7, 10), (5, 6, 9, 11)]  # one size
GROWING = [(0, 0, 9, 11), (1, 1, 4, 5), (2, 2, 4, 6), (3, 4, 8, 11)]


def literal(grid, boxes):
    """One token at a time, in exact fractions."""
    _, height, width = grid
    inner = [(t, x, b - 1, r - 1) for t, x, b, r in boxes]
    top, left, bottom, right = min(inner, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))

    def nearest(offset, wanted, size):
        return round(Fraction(offset * (wanted - 1), size - 1)) if size > 1 else 0  # round() is half to even

    ids = []
    for f, (t, x, b, r) in enumerate(inner):
        for i in range(height):
            for j in range(width):
                row, column = i, j
                if t <= i < b and x <= j < r:
                    row = top + nearest(i - t, bottom - top, b - t)
                    column = left + nearest(j - x, right - left, r - x)
                ids.append((f, row, column))
    return torch.tensor(ids)


@pytest.mark.parametrize("boxes", [STILL, MOVING, GROWING])
def test_ids_follow_the_rule(boxes):
    assert torch.equal(grid_ids(GRID)[anchored_rows(GRID, boxes)], literal(GRID, boxes))


def test_random_boxes_follow_the_rule():
    draw = torch.Generator().manual_seed(3)
    for _ in range(40):
        grid = tuple(torch.randint(2, 13, (3,), generator=draw).tolist())
        boxes = []
        for _ in range(grid[0]):
            first, last = [], []
            for size in grid[1:]:
                begin = int(torch.randint(0, size - 1, (), generator=draw))
                first.append(begin)
                last.append(int(torch.randint(begin + 2, size + 1, (), generator=draw)))
            boxes.append((*first, *last))
        rows = anchored_rows(grid, torch.tensor(boxes))
        assert torch.equal(grid_ids(grid)[rows], literal(grid, boxes)), (grid, boxes)


def test_boxes_that_stand_still_change_nothing():
    for boxes in (STILL, [(0, 0, 9, 11)] * 4):
        assert torch.equal(anchored_rows(GRID, boxes), torch.arange(4 * 9 * 11))


def test_time_is_kept_and_objects_stand_still():
    ids = grid_ids(GRID)[anchored_rows(GRID, MOVING)].view(*GRID, 3)
    assert torch.equal(ids[..., 0], torch.arange(4).view(4, 1, 1).expand(GRID))
    first = ids[0, 0:3, 0:4, 1:]
    for frame, (top, left, bottom, right) in enumerate(MOVING):
        assert torch.equal(ids[frame, top : bottom - 1, left : right - 1, 1:], first)


def test_last_row_and_column_of_a_box_keep_their_positions():
    ids = grid_ids(GRID)[anchored_rows(GRID, MOVING)].view(*GRID, 3)
    own = grid_ids(GRID).view(*GRID, 3)
    for frame, (_, _, bottom, right) in enumerate(MOVING):
        assert torch.equal(ids[frame, bottom - 1], own[frame, bottom - 1])
        assert torch.equal(ids[frame, :, right - 1], own[frame, :, right - 1])


@pytest.mark.parametrize(
    ("boxes", "error", "words"),
    [
        (STILL[:3], ValueError, "4 integer quadruples"),
        ([(0.0, 0.0, 4.0, 4.0)] * 4, ValueError, "integer"),
        ([*STILL[:3], (2, 3, 3, 8)], ValueError, r"boxes\[3\].*at least 2"),
        ([(-1, 0, 4, 4), *STILL[:3]], ValueError, r"boxes\[0\]"),
        ([(0, 0, 10, 4), *STILL[:3]], ValueError, r"boxes\[0\]"),
        (torch.zeros(4, 4, dtype=torch.int64, device="meta"), TypeError, "meta"),
    ],
)
def test_bad_boxes_are_named(boxes, error, words):
    with pytest.raises(error, match=words):
        anchored_rows(GRID, boxes)


def test_first_steps_only_by_the_step_context():
    geometry, tables = SimpleNamespace(grid=GRID), (torch.randn(396, 6), torch.randn(396, 6))
    rows = anchored_rows(GRID, MOVING)
    for steps in (5, 0.1):  # of 50
        positions = AnchoredBoxes(MOVING, steps)
        for step in (4, 0, 49, 5, 4):  # any order, any number of calls
            found = positions(StepContext(step=step, num_steps=50), geometry, tables)
            assert (found is not None) == (step < 5)
            if found is not None:
                assert torch.equal(found[0], tables[0][rows]) and torch.equal(found[1], tables[1][rows])
    with pytest.raises(RuntimeError, match="step is unknown"):
        AnchoredBoxes(MOVING, 5)(StepContext(), geometry, tables)
    with pytest.raises(RuntimeError, match="number of steps is unknown"):
        AnchoredBoxes(MOVING, 0.1)(StepContext(step=2), geometry, tables)


@pytest.mark.parametrize(("steps", "error"), [(-1, ValueError), (1.0, ValueError), (True, TypeError), ("5", TypeError)])
def test_bad_steps_are_named(steps, error):
    with pytest.raises(error, match="steps"):
        AnchoredBoxes(STILL, steps)
