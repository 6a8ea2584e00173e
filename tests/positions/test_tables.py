"""Ids, frequencies and tables against closed forms and against the tables of diffusers' own models."""

from __future__ import annotations

import math

import pytest
import torch

from vdit_fast.positions import frequencies, grid_ids, rope_tables, take_rows


def rotate(x, cos, sin):
    """Interleaved rotation of x [N, D] by compact tables [N, D / 2]."""
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def scores(q, k, ids_q, ids_k, axes):
    turned = (
        rotate(x.double(), *(t.double() for t in rope_tables(ids, axes, "compact")))
        for x, ids in ((q, ids_q), (k, ids_k))
    )
    return torch.matmul(next(turned), next(turned).mT)


@pytest.mark.parametrize("grid", [(1,), (7,), (3, 5), (2, 3, 4), (1, 1, 1)])
def test_grid_ids_are_the_coordinates(grid):
    ids = grid_ids(grid)
    assert ids.shape == (math.prod(grid), len(grid)) and ids.dtype == torch.int64
    for token, row in enumerate(ids.tolist()):
        assert token == sum(x * math.prod(grid[axis + 1 :]) for axis, x in enumerate(row))
    start = tuple(range(3, 3 + len(grid)))
    torch.testing.assert_close(grid_ids(grid, start=start), ids + torch.tensor(start))


@pytest.mark.parametrize("bad", [(0, 2), (2, -1), ()])
def test_grids_without_tokens_are_refused(bad):
    with pytest.raises(ValueError, match="grid"):
        grid_ids(bad)


def test_wrong_kinds_are_named():
    with pytest.raises(TypeError, match="grid"):
        grid_ids((2.0, 3))
    with pytest.raises(ValueError, match="start"):
        grid_ids((2, 3), start=(1,))
    with pytest.raises(ValueError, match="layout"):
        rope_tables(grid_ids((4,)), [frequencies(4)], "halves")
    with pytest.raises(ValueError, match="2 axes"):
        rope_tables(grid_ids((4,)), [frequencies(4)] * 2)
    with pytest.raises(TypeError, match=r"axes\[0\]"):
        rope_tables(grid_ids((4,)), [torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="even"):
        frequencies(5)
    with pytest.raises(ValueError, match="theta"):
        frequencies(4, 0.0)


def test_layouts_hold_the_same_values():
    axes = [frequencies(6), frequencies(4, 256.0), frequencies(0)]
    ids = torch.randn(11, 3) * 9
    compact, pairs, half = (rope_tables(ids, axes, layout) for layout in ("compact", "interleaved", "half"))
    for once, twice, behind in zip(compact, pairs, half, strict=True):
        assert once.shape == (11, 5) and twice.shape == behind.shape == (11, 10) and once.dtype == torch.float32
        assert torch.equal(twice[:, 0::2], once) and torch.equal(twice[:, 1::2], once)
        assert torch.equal(behind, torch.cat((once, once), dim=1))
    angle = ids[:, 1].double()[:, None] * torch.tensor([1.0, 1 / 16], dtype=torch.float64)
    torch.testing.assert_close(compact[0][:, 3:].double(), angle.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(compact[1][:, 3:].double(), angle.sin(), atol=1e-7, rtol=0)


def test_position_zero_is_the_identity():
    cos, sin = rope_tables(torch.zeros(5, 2), [frequencies(4), frequencies(6)])
    assert torch.equal(cos, torch.ones(5, 10)) and torch.equal(sin, torch.zeros(5, 10))


def test_a_common_offset_leaves_the_scores():
    """E1a of the check list: rotations enter scores by differences of positions."""
    axes = [frequencies(8), frequencies(4), frequencies(4)]
    q, k, ids = torch.randn(24, 16), torch.randn(24, 16), grid_ids((2, 3, 4))
    here = scores(q, k, ids, ids, axes)
    there = scores(q, k, ids + torch.tensor([100, -7, 31]), ids + torch.tensor([100, -7, 31]), axes)
    torch.testing.assert_close(here, there, atol=5e-6, rtol=0)
    assert (here - scores(q, k, ids, ids + 1, axes)).abs().max() > 0.1


def test_keys_rotated_back_are_keys_at_new_positions():
    """E1b: a cache of rotated keys moved by delta is a cache of raw keys at the new positions."""
    axes, ids, k = [frequencies(16)], torch.arange(12)[:, None], torch.randn(12, 16).double()
    table = [t.double() for t in rope_tables(ids, axes, "compact")]
    back = [t.double() for t in rope_tables(torch.full_like(ids, -3), axes, "compact")]
    fresh = [t.double() for t in rope_tables(ids - 3, axes, "compact")]
    torch.testing.assert_close(rotate(rotate(k, *table), *back), rotate(k, *fresh), atol=1e-6, rtol=0)


def test_stock_ids_give_the_tables_of_the_models():
    """Bit for bit: Wan's in float64 angles, HunyuanVideo's and CogVideoX' in float32 ones."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    ids = grid_ids((5, 6, 7))
    own = WanRotaryPosEmbed(128, (1, 2, 2), 64)(torch.zeros(1, 1, 5, 12, 14))
    for got, want in zip(rope_tables(ids, [frequencies(w) for w in (44, 42, 42)]), own, strict=True):
        assert torch.equal(got, want[0, :, 0])
    own = HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)(torch.zeros(1, 1, 5, 12, 14))
    axes = [frequencies(w, 256.0, dtype=torch.float32) for w in (16, 56, 56)]
    for got, want in zip(rope_tables(ids, axes), own, strict=True):
        assert torch.equal(got, want)
    own = get_3d_rotary_pos_embed(64, ((0, 0), (6, 7)), (6, 7), 5)
    axes = [frequencies(w, dtype=torch.float32) for w in (16, 24, 24)]
    for got, want in zip(rope_tables(ids, axes), own, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # its grid is a linspace, one rounding off integers


@pytest.mark.parametrize("shape", [(20, 6), (1, 20, 1, 6), (1, 3, 20, 6)])
def test_take_rows_finds_the_tokens(shape):
    tables, rows = (torch.randn(shape), torch.randn(shape)), torch.randint(20, (20,))
    dim = shape.index(20)
    for got, table in zip(take_rows(tables, rows), tables, strict=True):
        assert torch.equal(got, table.index_select(dim, rows))


@pytest.mark.parametrize("shape", [(19, 20), (20, 20, 6)])
def test_take_rows_refuses_what_it_cannot_tell(shape):
    table = torch.randn(shape)
    with pytest.raises(ValueError, match="dimensions of the tables"):
        take_rows((table, table), torch.arange(20))
