"""Which tokens lie in the box, which share a position with an anchored one, and who reads whom."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vdit_fast.positions import anchored_rows
from vdit_fast.regions import CLASSES, region_labels, region_plan


def by_definition(grid, boxes):
    """The class of every token from explicit ids and every pair of them."""
    frames, height, width = grid
    ids = torch.tensor(list(itertools.product(range(frames), range(height), range(width))))[anchored_rows(grid, boxes)]
    same = (ids[:, None] == ids[None]).all(-1)
    same.fill_diagonal_(False)
    labels = []
    for n, (f, y, x) in enumerate(itertools.product(range(frames), range(height), range(width))):
        top, left, bottom, right = boxes[f]
        inside = top <= y < bottom and left <= x < right
        labels.append(CLASSES.index("box" if inside else "redundant" if same[n].any() else "other"))
    return torch.tensor(labels)


@st.composite
def grids_and_boxes(draw):
    grid = draw(st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 7)))
    boxes = []
    for _ in range(grid[0]):
        top, left = draw(st.integers(0, grid[1] - 2)), draw(st.integers(0, grid[2] - 2))
        boxes.append((top, left, draw(st.integers(top + 2, grid[1])), draw(st.integers(left + 2, grid[2]))))
    return grid, boxes


@settings(max_examples=60, deadline=None)
@given(grids_and_boxes())
def test_labels(case):
    grid, boxes = case
    assert torch.equal(region_labels(grid, boxes), by_definition(grid, boxes))


@settings(max_examples=30, deadline=None)
@given(grids_and_boxes(), st.integers(0, 4), st.data())
def test_plan(case, context, data):
    grid, boxes = case
    first = data.draw(st.integers(0, context))
    labels = region_labels(grid, boxes)
    assume((labels == 2).any())
    plan = region_plan(labels, context, first=first).validate()
    whole = [-1] * first + labels.tolist() + [-1] * (context - first)
    want = torch.tensor([[{a, b} != {1, 2} for b in whole] for a in whole])
    assert torch.equal(plan.to_mask()[0, 0], want)
    assert plan.density < 1 and plan.nbytes < 64 * len(whole) + 4096, "no mask of N x N"


@pytest.mark.parametrize("grid", [(3, 5, 7), (4, 6, 6)])
def test_boxes_that_stand_still_forbid_nothing(grid):
    for box in ((1, 2, 4, 5), (0, 0, grid[1], grid[2])):
        labels = region_labels(grid, [box] * grid[0])
        assert not (labels == 2).any() and region_plan(labels) is None
        assert int((labels == 1).sum()) == grid[0] * (box[2] - box[0]) * (box[3] - box[1])


def test_the_place_of_the_anchor_is_redundant_where_the_object_is_elsewhere():
    grid, boxes = (2, 6, 8), [(0, 0, 3, 3), (3, 5, 6, 8)]
    labels = region_labels(grid, boxes).view(grid)
    assert not (labels[0] == 2).any(), "the anchor's own frame"
    redundant = (labels[1] == 2).nonzero().tolist()
    assert redundant == [[0, 0], [0, 1], [1, 0], [1, 1]], "the anchor without its last row and column"
