"""The tables and row maps as the fused QK-norm and RoPE operator takes them."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.ops import qk_norm_rope
from vdit_fast.positions import anchored_rows, extended_ids, frequencies, grid_ids, rope_tables, take_rows

GRID = (3, 4, 5)
BOXES = [(0, 0, 3, 3), (1, 1, 4, 5), (0, 2, 4, 5)]
AXES = [frequencies(width) for width in (8, 12, 12)]


def rotate(x, ids, half):
    """x [B, N, H, 32] turned by the angles of its ids, fp64."""
    angles = torch.cat([ids[:, axis, None].double() * steps for axis, steps in enumerate(AXES)], dim=1)[:, None]
    pairs = x.double().unflatten(-1, (2, -1)).unbind(-2) if half else x.double().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (
        pairs[0] * angles.cos() - pairs[1] * angles.sin(),
        pairs[0] * angles.sin() + pairs[1] * angles.cos(),
    )
    return torch.cat(turned, dim=-1) if half else torch.stack(turned, dim=-1).flatten(-2)


@pytest.mark.parametrize(("layout", "rope"), [("interleaved", "interleaved"), ("half", "half")])
@pytest.mark.parametrize("compact", [False, True])
def test_layouts_are_the_operators(layout, rope, compact):
    ids = extended_ids(GRID)
    q, k = torch.randn(2, 2, len(ids), 3, 32).unbind(0)
    cos, sin = rope_tables(ids, AXES, "compact" if compact else layout)
    for x, got in zip((q, k), qk_norm_rope(q, k, cos=cos, sin=sin, rope=rope)[:2], strict=True):
        torch.testing.assert_close(got.double(), rotate(x, ids, rope == "half"), atol=2e-6, rtol=1e-5)


def test_row_maps_are_its_positions():
    """No table is copied: the operator looks the row of every token up."""
    q, k = torch.randn(2, 1, 60, 2, 32).unbind(0)
    tables = rope_tables(grid_ids(GRID), AXES)
    rows = anchored_rows(GRID, BOXES)
    got = qk_norm_rope(q, k, cos=tables[0], sin=tables[1], positions=rows.int())
    cos, sin = take_rows(tables, rows)
    for one, other in zip(got[:2], qk_norm_rope(q, k, cos=cos, sin=sin)[:2], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(got[0], qk_norm_rope(q, k, cos=tables[0], sin=tables[1])[0])
