"""Windows over a token grid and block-causal order, against their definitions."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.plan import block_causal, from_block_mask, from_mask, windows3d

FAST = settings(max_examples=30, deadline=None)
AXIS = st.integers(1, 5)
TRIPLE = st.tuples(AXIS, AXIS, AXIS)


def with_text(video: torch.Tensor, text: int, first: bool) -> torch.Tensor:
    length = len(video) + text
    mask = torch.ones(length, length, dtype=torch.bool)
    begin = text if first else 0
    mask[begin : begin + len(video), begin : begin + len(video)] = video
    return mask[None, None]


def sliding_axis(size: int, window: int, tile: int) -> list[list[bool]]:
    """Token against token along one axis."""
    tiles = -(-size // tile)
    count = min(-(-window // tile), tiles)
    table = []
    for i in range(size):
        begin = i // tile - count // 2
        while begin < 0:
            begin += 1
        while begin + count > tiles:
            begin -= 1
        table.append([begin <= j // tile < begin + count for j in range(size)])
    return table


@FAST
@given(TRIPLE, TRIPLE, st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 3), st.booleans(), st.sampled_from([3, 128]))
def test_sliding(agrees, grid, window, tile, text, text_first, q_tile):
    plan = windows3d(grid, window, tile=tile, text=text, text_first=text_first, q_tile=q_tile)
    axes = [sliding_axis(*spec) for spec in zip(grid, window, tile, strict=True)]
    tokens = list(itertools.product(*(range(n) for n in grid)))
    video = torch.tensor([[all(t[a][b] for t, a, b in zip(axes, x, y, strict=True)) for y in tokens] for x in tokens])
    agrees(plan, with_text(video, text, text_first))


@FAST
@given(TRIPLE, TRIPLE, st.data(), st.integers(0, 3), st.booleans())
def test_partition(agrees, grid, window, data, text, text_first):
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    plan = windows3d(grid, window, shift=shift, mode="partition", text=text, text_first=text_first)
    tokens = list(itertools.product(*(range(n) for n in grid)))
    cells = [tuple((a - s) // w for a, s, w in zip(x, shift, window, strict=True)) for x in tokens]
    video = torch.tensor([[a == b for b in cells] for a in cells])
    agrees(plan, with_text(video, text, text_first))


@pytest.mark.parametrize(("tiles", "count"), [((3, 3, 3), 27), ((5, 3, 3), 45), ((3, 3, 5), 45), ((5, 6, 1), 30)])
def test_tiles_per_query_of_sliding_tile_attention(tiles, count):
    window = tuple(n * t for n, t in zip(tiles, (6, 8, 8), strict=True))
    plan = windows3d((30, 48, 80), window, tile=(6, 8, 8), q_tile=384).validate()
    assert len(plan.tiles) == 300
    assert plan.density == pytest.approx(count / 300)
    ptr = plan.run_ptr.tolist()
    keys = {int(plan.runs[a:b, 1].sum()) for a, b in itertools.pairwise(ptr)}
    assert keys == {count * 384}


def test_odd_window_has_its_centre_clamped():
    """The formula of the paper: keep a tile when it is within half a window of the clamped centre."""
    plan = windows3d((1, 1, 9), (1, 1, 5), tile=(1, 1, 1))
    i = torch.arange(9)
    assert torch.equal(plan.to_mask()[0, 0], (i.clamp(2, 6)[:, None] - i[None, :]).abs() <= 2)


@pytest.mark.parametrize("mode", ["sliding", "partition"])
def test_whole_grid_is_dense(mode):
    plan = windows3d((3, 5, 7), (3, 50, 7), tile=(2, 2, 2), mode=mode, text=4).validate()
    assert plan.density == 1.0
    assert (plan.runs[:, 1] == 109).all() and len(plan.runs) == len(plan.tiles)


def test_shift_without_wrap_gives_partial_windows():
    plan = windows3d((4, 4, 4), (2, 2, 2), shift=(1, 1, 1), mode="partition")
    assert sorted(plan.tiles[:, 2].tolist()) == sorted([1] * 8 + [2] * 12 + [4] * 6 + [8])
    assert windows3d((4, 4, 4), (2, 2, 2), mode="partition").density == pytest.approx(8 / 64)


def test_tile_order_is_a_raster_of_tiles():
    plan = windows3d((1, 2, 4), (1, 2, 2), tile=(1, 2, 2))
    assert plan.q_order is not None
    assert plan.q_order.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert plan.q_order is plan.kv_order


@FAST
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum),
    st.none() | st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from([2, 128]),
)
def test_block_causal(agrees, sizes, window, sinks, full, q_tile):
    plan = block_causal(sizes, window=window, sinks=sinks, full=full, q_tile=q_tile)
    block = [i for i, n in enumerate(sizes) for _ in range(n)]
    mask = torch.zeros(len(block), len(block), dtype=torch.bool)
    for row, i in enumerate(block):
        for column, j in enumerate(block):
            near = window is None or j >= max(0, i - window + 1)
            mask[row, column] = (j <= i and (near or j < sinks)) or min(i, j) < full
    agrees(plan, mask[None, None])


def test_block_causal_is_the_rollout():
    """Block i reads as many keys as have been generated when it is."""
    plan = block_causal([4, 4, 4, 4])
    assert plan.to_mask().sum(-1).flatten().tolist() == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4
    assert torch.equal(block_causal([1] * 30).to_mask()[0, 0], torch.ones(30, 30).bool().tril())


def test_large_shapes_build_fast():
    """A whole 480p video with 64-token blocks, then a 720p one with 128-token blocks and 24 heads."""
    generator = torch.Generator().manual_seed(0)
    started = time.process_time()
    plan = from_block_mask(torch.rand(1, 12, 512, 512, generator=generator) < 0.3, 64, 64, lq=32760, lk=32760)
    windows3d((21, 30, 52), (9, 16, 16), tile=(3, 8, 8))
    block_causal([1560] * 21, window=7, sinks=1)
    assert time.process_time() - started < 5  # a loop over tokens or tiles takes minutes
    plan.validate()
    assert plan.density == pytest.approx(0.3, abs=0.01)
    started = time.process_time()
    plan = from_block_mask(torch.rand(24, 990, 990, generator=generator) < 0.1, 128, 128)
    assert time.process_time() - started < 10
    assert plan.density == pytest.approx(0.1, abs=0.01)


def test_windows_equal_their_mask():
    plan = windows3d((3, 4, 6), (2, 4, 2), tile=(2, 2, 2), text=5, text_first=True)
    again = from_mask(plan.to_mask())
    assert torch.equal(again.to_mask(), plan.to_mask())
    assert again.exact_density == pytest.approx(plan.density)
