"""Attention composed of several calls: gated text, pooled keys."""

from __future__ import annotations

import math

import pytest
import torch

from vdit_fast.ops import gated_attention, pooled_attention
from vdit_fast.plan import AttentionPlan

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def softmax_attention(q, k, v, scale=None, mask=None):
    """fp64, grouped heads repeated."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), v)


def draw(tokens, text=7, heads=4, kv_heads=2, dim=24, batch=2, dtype=torch.float32):
    q = torch.randn(batch, tokens, heads, dim, dtype=dtype)
    k, v = torch.randn(2, batch, tokens, kv_heads, dim, dtype=dtype)
    k_text, v_text = torch.randn(2, batch, text, kv_heads, dim, dtype=dtype)
    return q, k, v, k_text, v_text


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "text"), [(1, 1), (37, 7), (64, 13)])
def test_gated_attention_is_the_formula(dtype, tokens, text):
    q, k, v, k_text, v_text = draw(tokens, text, dtype=dtype)
    gate = torch.randn(4, dtype=dtype)
    text_len = torch.tensor([text, text // 2])
    valid = (torch.arange(text) < text_len[:, None])[:, None, None]
    want = softmax_attention(q, k, v, 0.31)
    want += gate.double().tanh()[:, None] * softmax_attention(q, k_text, v_text, mask=valid)
    got = gated_attention(q, k, v, k_text, v_text, gate, scale=0.31, text_len=text_len)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_gated_attention_takes_a_plan():
    q, k, v, k_text, v_text = draw(48)
    blocks = torch.rand(2, 4, 3, 3) < 0.5
    blocks[..., 0] = True
    plan = AttentionPlan.from_block_mask(blocks, [16] * 3, [16] * 3)
    gate = torch.randn(4)
    want = softmax_attention(q, k, v, mask=plan.to_mask())
    want += gate.double().tanh()[:, None] * softmax_attention(q, k_text, v_text)
    torch.testing.assert_close(
        gated_attention(q, k, v, k_text, v_text, gate, plan).double(), want, atol=4e-6, rtol=1e-5
    )


def test_gated_attention_learns_its_gate_from_zero():
    q, k, v, k_text, v_text = (x.requires_grad_() for x in draw(9))
    gate = torch.zeros(4, requires_grad=True)
    gated_attention(q, k, v, k_text, v_text, gate).square().sum().backward()
    gradient = gate.grad.clone()
    own = softmax_attention(q, k, v).detach()
    want = 2 * (own * softmax_attention(q, k_text, v_text).detach()).sum((0, 1, 3))
    torch.testing.assert_close(gradient.double(), want, atol=1e-4, rtol=1e-4)
    assert all(x.grad is not None for x in (q, k, v)) and k_text.grad.abs().max() == 0


def test_gated_attention_names_a_wrong_gate():
    with pytest.raises(ValueError, match=r"gate is \[2\].*4 heads"):
        gated_attention(*draw(5), torch.zeros(2))


GRIDS = [
    ((2, 4, 6), (1, 2, 2)),
    ((3, 5, 7), (2, 2, 2)),
    ((1, 9, 4), (1, 4, 3)),
    ((2, 3, 3), (1, 1, 1)),
    ((2, 3, 2), (2, 3, 2)),
]


@pytest.mark.parametrize(("grid", "cell"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_exact_for_constant_cells(grid, cell, dtype):
    """C1 of the check list, also where the border cuts cells."""
    tokens = math.prod(grid)
    q, *_ = draw(tokens + 3, dtype=dtype)
    index = torch.stack(torch.meshgrid(*(torch.arange(n) // c for n, c in zip(grid, cell, strict=True)), indexing="ij"))
    which = index.flatten(1)
    rows = (which[0] * 100 + which[1]) * 100 + which[2]
    rows = rows.unique(return_inverse=True)[1]
    k, v = torch.randn(2, 2, int(rows.max()) + 1, 2, 24, dtype=dtype)[:, :, rows]
    want = softmax_attention(q, k, v, 0.2)
    got = pooled_attention(q, k, v, grid, cell, scale=0.2)
    torch.testing.assert_close(got.double(), want, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("grid", "cell"), GRIDS)
def test_pooling_averages(grid, cell):
    q, k, v, *_ = draw(math.prod(grid))
    cells = []
    for x in (k, v):
        pooled, counts = [], []
        volume = x.unflatten(1, grid)
        for f in range(0, grid[0], cell[0]):
            for h in range(0, grid[1], cell[1]):
                for w in range(0, grid[2], cell[2]):
                    block = volume[:, f : f + cell[0], h : h + cell[1], w : w + cell[2]].flatten(1, 3)
                    pooled.append(block.double().mean(1))
                    counts.append(block.shape[1])
        cells.append(torch.stack(pooled, 1).repeat_interleave(torch.tensor(counts), dim=1))
    want = softmax_attention(q, *cells)
    torch.testing.assert_close(pooled_attention(q, k, v, grid, cell).double(), want, atol=4e-6, rtol=1e-5)


def test_pooling_is_differentiable():
    q, k, v, *_ = (x.double().float().requires_grad_() for x in draw(3 * 3 * 5))
    pooled_attention(q, k, v, (3, 3, 5), (1, 2, 2)).square().sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    step = 1e-3
    for x, grad in zip((q, k, v), grads, strict=True):
        direction = torch.randn_like(x)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                moved = [y + sign * step * direction if y is x else y for y in (q, k, v)]
                values.append(pooled_attention(*moved, (3, 3, 5), (1, 2, 2)).double().square().sum())
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((grad * direction).double().sum(), slope, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("cell", [(1, 2), (0, 1, 1), (1, 2, 9)])
def test_pooling_names_a_wrong_cell(cell):
    q, k, v, *_ = draw(48)
    with pytest.raises(ValueError, match="cell"):
        pooled_attention(q, k, v, (2, 4, 6), cell)


def test_pooling_names_a_wrong_grid():
    q, k, v, *_ = draw(48)
    with pytest.raises(ValueError, match="45 tokens of grid"):
        pooled_attention(q, k, v, (3, 3, 5), (1, 1, 1))


def test_both_compile_to_one_graph():
    q, k, v, k_text, v_text = draw(3 * 3 * 5)
    gate = torch.randn(4)

    def both(q, k, v):
        return gated_attention(q, k, v, k_text, v_text, gate) + pooled_attention(q, k, v, (3, 3, 5), (1, 2, 2))

    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
        torch.testing.assert_close(compiled, both(q, k, v), atol=1e-6, rtol=1e-6)


def test_no_text_and_no_queries():
    q, k, v, k_text, v_text = draw(5)
    empty = k_text[:, :0]
    assert torch.equal(
        gated_attention(q, k, v, empty, empty, torch.randn(4)), gated_attention(q, k, v, k_text, v_text, torch.zeros(4))
    )
    assert gated_attention(q[:, :0], k, v, k_text, v_text, torch.randn(4)).shape == (2, 0, 4, 24)
