"""Shifted windows: what each layer reads, without wrapping, on any grid, with text and sinks."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import vdit_fast
from vdit_fast.planners import ShiftedWindow, from_dict
from vdit_fast.reference import attention


def window_of(position: int, size: int, length: int, odd: bool) -> int:
    """Number of the window a coordinate lies in, by the definition: borders at shift + k * size."""
    shift = size // 2 if odd and size < length else 0
    return (position - shift) // size


def mask(planner: ShiftedWindow, ctx) -> torch.Tensor:
    """bool [N, N] of one layer."""
    widths = planner.widths(ctx.grid)
    cells = [
        tuple(window_of(p, w, n, ctx.layer % 2 == 1) for p, w, n in zip(place, widths, ctx.grid, strict=True))
        for place in itertools.product(*map(range, ctx.grid))
    ]
    video = torch.tensor([[a == b for b in cells] for a in cells])
    video[:, : planner.sinks * ctx.grid[1] * ctx.grid[2]] = True  # at least: sinks are rounded up to windows
    full = torch.ones(ctx.num_tokens, ctx.num_tokens, dtype=torch.bool)
    full[ctx.video_slice, ctx.video_slice] = video
    return full


@pytest.mark.parametrize("layer", [0, 1, 2, 5])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((4, 4, 4), (2, 2, 2)),
        ((5, 7, 9), (2, 3, 4)),
        ((3, 5, 2), (1, 4, 0)),
        ((1, 1, 7), (9, 1, 3)),
        ((2, 2, 2), (1, 1, 1)),
    ],
)
def test_what_a_layer_reads(context, grid, window, text_first, layer):
    ctx = context(grid, text=3, text_first=text_first, layer=layer)
    planner = ShiftedWindow(window=window)
    q, k, v = torch.randn(3, 1, ctx.num_tokens, 2, 8).unbind()
    plan = planner.plan(q, k, ctx).validate()
    assert torch.equal(plan.to_mask()[0, 0], mask(planner, ctx))
    assert planner.plan(q, k, ctx) is plan
    want = attention(q.double(), k.double(), v.double(), plan)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan).double(), want, atol=2e-6, rtol=1e-5)


def test_every_other_layer_is_shifted_and_an_axis_of_one_window_is_not(context):
    planner = ShiftedWindow(window=(0, 4, 4))
    assert planner.axes((6, 8, 10), 0) == planner.axes((6, 8, 10), 2) == ((6,), (4, 4), (4, 4, 2))
    assert planner.axes((6, 8, 10), 1) == ((6,), (2, 4, 2), (2, 4, 4))
    still = ShiftedWindow(window=(0, 4, 4), shift=False)
    assert still.axes((6, 8, 10), 1) == still.axes((6, 8, 10), 0)


def test_sinks_are_read_by_all(context):
    ctx = context((4, 4, 4), layer=1)
    planner = ShiftedWindow(window=(2, 2, 2), sinks=1)
    q = torch.randn(1, 64, 1, 8)
    assert torch.equal(planner.plan(q, q, ctx).to_mask()[0, 0], mask(planner, ctx))


def test_one_window_is_dense(context):
    ctx = context((3, 4, 5))
    assert "whole grid" in str(ShiftedWindow(window=(3, 0, 9)).decide(ctx))
    assert ShiftedWindow(window=(3, 0, 4)).decide(ctx) is None
    q = torch.randn(1, ctx.num_tokens, 1, 8)
    assert ShiftedWindow(window=(0, 0, 0)).plan(q, q, ctx).density == 1.0


@pytest.mark.parametrize("grid", [(21, 30, 52), (5, 7, 9), (13, 1, 1), (1, 1, 1), (16, 64, 64)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
def test_sparsity_is_met_by_the_windows(context, grid, sparsity):
    ctx = context(grid)
    planner = ShiftedWindow(sparsity=sparsity)
    if sparsity == 0:
        assert planner.widths(grid) == grid
        return
    n = ctx.num_tokens
    shares = [
        sum(a * a * b * b * c * c for a, b, c in itertools.product(*planner.axes(grid, layer))) / n**2
        for layer in (0, 1)
    ]
    if n > 100:
        assert shares[0] == pytest.approx(1 - sparsity, rel=0.5)
        assert shares[1] < 1
    else:
        assert shares[0] <= 1


def test_knobs():
    planner = from_dict(json.loads(json.dumps({"method": "shifted_window", "window": [4, 8, 8]})))
    assert planner == ShiftedWindow(window=(4, 8, 8)) and from_dict(planner.to_dict()) == planner
    for knobs, words in (
        ({"window": (4, 8)}, "window must be 3"),
        ({"window": (4, -1, 8)}, "window"),
        ({"sparsity": 1.0}, "sparsity"),
    ):
        with pytest.raises(ValueError, match=words):
            ShiftedWindow(**knobs)
    with pytest.raises(TypeError, match="shift"):
        ShiftedWindow(shift=1)
