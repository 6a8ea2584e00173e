"""Ids of several streams in one sequence, and of sequences with marker tokens."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.positions import extended_ids, grid_ids, marked_sequence


@pytest.mark.parametrize("grid", [(4, 3, 5), (3, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_streams_lie_below_each_other(grid, streams):
    ids = extended_ids(grid, streams).view(streams, -1, 3)
    for stream in range(streams):
        assert torch.equal(ids[stream], grid_ids(grid, start=(0, stream * grid[1], 0)))
    assert len(ids.view(-1, 3).unique(dim=0)) == ids.shape[0] * ids.shape[1]
    tall = grid_ids((grid[0], streams * grid[1], grid[2]))
    assert torch.equal(extended_ids(grid, streams, frame_major=True), tall)


def test_one_frame_is_the_same_in_both_orders():
    assert torch.equal(extended_ids((1, 3, 4)), extended_ids((1, 3, 4), frame_major=True))


def test_bad_streams_are_refused():
    with pytest.raises(ValueError, match="grid"):
        extended_ids((2, 2, 2), 0)


@pytest.mark.parametrize("frame_markers", [True, False])
@pytest.mark.parametrize("grid", [(2, 3, 4), (1, 1, 1), (3, 1, 2)])
def test_markers_end_rows_and_frames(grid, frame_markers):
    frames, height, width = grid
    layout = marked_sequence(grid, frame_markers=frame_markers)
    kinds = []
    for _ in range(frames):
        for _ in range(height):
            kinds += ["token"] * width + ["line"]
        kinds += ["frame"] * frame_markers
    assert layout.length == len(kinds)
    for kind, places in (("token", layout.video), ("line", layout.lines), ("frame", layout.frames)):
        assert places.tolist() == [place for place, found in enumerate(kinds) if found == kind]
    assert torch.equal(layout.ids, torch.arange(len(kinds))[:, None])


def test_insert_keeps_the_order():
    layout = marked_sequence((2, 2, 3))
    video, line, frame = torch.randn(2, 12, 5), torch.randn(5), torch.randn(5)
    full = layout.insert(video, line, frame)
    assert torch.equal(full[:, layout.video], video)
    assert torch.equal(full[:, layout.lines], line.expand(2, 4, 5))
    assert torch.equal(full[:, layout.frames], frame.expand(2, 2, 5))
    with pytest.raises(ValueError, match="nextframe"):
        layout.insert(video, line)
