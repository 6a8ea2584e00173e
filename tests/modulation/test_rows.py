"""Which modulation row a token takes."""

from __future__ import annotations

import math

import pytest
import torch

from vdit_fast.modulation import coarse_rows, frame_rows, temporal_rows

GRID = (3, 4, 5)


def test_frame_rows():
    rows = frame_rows(GRID)
    assert rows.dtype == torch.int32 and rows.tolist() == [f for f in range(3) for _ in range(20)]


def test_temporal_rows_point_into_the_clips_table():
    table, tokens = torch.randn(2, 3, 7), 4  # [B, F, C]
    rows = temporal_rows(2, 3, tokens)
    assert rows.dtype == torch.int32 and rows.shape == (8, 3)
    assert torch.equal(table.flatten(0, 1)[rows.long()], table.repeat_interleave(tokens, dim=0))


@pytest.mark.parametrize("coarse", [(1, 1, 1), (3, 2, 5), (3, 4, 5), (2, 3, 2), (1, 4, 1)])
def test_coarse_rows_hold_the_tokens_centre(coarse):
    rows = coarse_rows(GRID, coarse)
    want = [
        (f * coarse[1] + h) * coarse[2] + w
        for f, h, w in (
            tuple(math.floor((x + 0.5) * few / many) for x, few, many in zip((f, h, w), coarse, GRID, strict=True))
            for f in range(3)
            for h in range(4)
            for w in range(5)
        )
    ]
    assert rows.dtype == torch.int32 and rows.tolist() == want
    assert set(want) == set(range(math.prod(coarse)))  # no row is left out
    values = torch.randn(1, 2, *coarse)
    nearest = torch.nn.functional.interpolate(values, size=GRID, mode="nearest-exact").flatten(2)
    assert torch.equal(values.flatten(2)[..., rows.long()], nearest)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: coarse_rows(GRID, (3, 5, 5)), "finer"),
        (lambda: coarse_rows(GRID, (0, 1, 1)), "coarse"),
        (lambda: frame_rows((2, 0, 1)), "grid"),
        (lambda: temporal_rows(0, 1, 1), "batch"),
    ],
)
def test_bad_sizes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
