"""ARLON: Boosting Diffusion Transformers with Autoregressive Models for Long Video Generation (arXiv 2410.20502).

Coarse codes of an autoregressive model reach the tokens of a DiT by adaptive norms: every token takes scale, shift and
gate from the coarse cell it lies in. The injection's exact formula is not public; what is tested is the per-token
modulation through a coarse grid.
"""

from __future__ import annotations

import pytest
import torch

from vdit_fast.modulation import coarse_rows
from vdit_fast.ops import adaln_modulate, gate_residual, gate_residual_norm

GRID, COARSE, WIDTH = (4, 6, 10), (2, 3, 5), 64
TOKENS, CELLS = 240, 30


def draw(dtype=torch.float32, cells=CELLS, batch=2):
    x, y = torch.randn(2, batch, TOKENS, WIDTH, dtype=dtype).unbind(0)
    return x, y, torch.randn(3, batch, cells, WIDTH, dtype=dtype).unbind(0)


def materialise(table, grid=GRID, coarse=COARSE):
    """[B, N, C]: every coarse row repeated for the tokens of its cell."""
    volume = table.unflatten(1, coarse)
    for axis in range(3):
        volume = volume.repeat_interleave(grid[axis] // coarse[axis], dim=axis + 1)
    return volume.flatten(1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_rows_and_an_index_are_the_materialised_rows(dtype):
    x, y, (scale, shift, gate) = draw(dtype)
    index = coarse_rows(GRID, COARSE)
    full = [materialise(table) for table in (scale, shift, gate)]
    assert torch.equal(adaln_modulate(x, scale, shift, index=index), adaln_modulate(x, *full[:2]))
    assert torch.equal(gate_residual(x, y, gate, index=index), gate_residual(x, y, full[2]))
    for got, want in zip(
        gate_residual_norm(x, y, gate, scale, shift, index=index),
        gate_residual_norm(x, y, full[2], *full[:2]),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_the_formula():
    x, y, (scale, shift, gate) = draw()
    index = coarse_rows(GRID, COARSE)
    s, b, g = (materialise(table).double() for table in (scale, shift, gate))
    x_new, h = gate_residual_norm(x, y, gate, scale, shift, index=index)
    sums = x.double() + g * y.double()
    want = torch.nn.functional.layer_norm(sums, (WIDTH,), eps=1e-6) * (1 + s) + b
    torch.testing.assert_close(x_new.double(), sums, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(h.double(), want, atol=1e-5, rtol=1e-4)


def test_a_grid_that_does_not_divide_takes_the_nearest_cell():
    x, _, (scale, shift, _) = draw(cells=12)
    coarse = (3, 4, 1)
    volume = [
        torch.nn.functional.interpolate(table.mT.unflatten(2, coarse), size=GRID, mode="nearest-exact").flatten(2).mT
        for table in (scale, shift)
    ]
    got = adaln_modulate(x, scale, shift, index=coarse_rows(GRID, coarse))
    assert torch.equal(got, adaln_modulate(x, *(table.contiguous() for table in volume)))


def test_a_constant_grid_is_the_scalar_path():
    x, y, (scale, shift, gate) = draw(cells=1)
    index = coarse_rows(GRID, COARSE)
    spread = [table.expand(-1, CELLS, -1).contiguous() for table in (scale, shift, gate)]
    one = [table[:, 0] for table in (scale, shift, gate)]
    assert torch.equal(adaln_modulate(x, *spread[:2], index=index), adaln_modulate(x, *one[:2]))
    assert torch.equal(gate_residual(x, y, spread[2], index=index), gate_residual(x, y, one[2]))


def test_gate_zero_is_the_base_model():
    x, y, (_, _, gate) = draw()
    index = coarse_rows(GRID, COARSE)
    assert torch.equal(gate_residual(x, y, torch.zeros_like(gate), index=index), x)
    gate[:, 7] = 0  # one cell only
    moved = gate_residual(x, y, gate, index=index) != x
    assert torch.equal(moved.any(-1).all(0), index != 7)


def test_batch_items_have_tables_of_their_own():
    x, _, (scale, shift, _) = draw()
    index = coarse_rows(GRID, COARSE)
    got = adaln_modulate(x, scale, shift, index=index)
    for item in range(2):
        own = slice(item, item + 1)
        assert torch.equal(got[own], adaln_modulate(x[own], scale[own], shift[own], index=index))


def test_what_the_index_saves():
    """Wan 1.3B at 480p: three materialised tables take 0.30 GB per block in bf16; a coarse one and an index 0.002."""
    tokens, width, cells = 21 * 30 * 52, 1536, 7 * 5 * 4
    assert round(3 * tokens * width * 2 / 1e9, 2) == 0.30
    index = coarse_rows((21, 30, 52), (7, 5, 4))
    assert index.numel() * index.element_size() + 3 * cells * width * 2 < 2e6
