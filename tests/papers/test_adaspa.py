"""Training-free and Adaptive Sparse Attention for Efficient Long Video Generation (AdaSpa, arXiv 2502.21079)."""

from __future__ import annotations

import pytest
import torch
from planner_calls import call, dense_weights, draw, kind, layer

import vdit_fast
from vdit_fast import ops
from vdit_fast.planners import AdaSpa, adaspa

GRID = (3, 10, 13)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_block_sums_of_a_row_add_up_to_one(block):
    q, k, v = draw(layer(GRID), 2, 16, 2)
    _, lse = vdit_fast.attention(q, k, v, return_lse=True)
    per_row = ops.block_mass(q, k, lse, 1, block)  # one query per block row
    torch.testing.assert_close(per_row.sum(-1), torch.ones(2, 2, 390), atol=1e-5, rtol=1e-5)
    exact = torch.stack([part.sum(-1) for part in dense_weights(q, k).split(block, -1)], -1)
    torch.testing.assert_close(per_row.double(), exact, atol=1e-6, rtol=1e-5)
    mass = AdaSpa(block=block).mass(q, k, lse, layer(GRID))
    rows = torch.tensor([min(block, 390 - start) for start in range(0, 390, block)])
    torch.testing.assert_close(mass.sum(-1), rows.float().expand(2, 2, -1), atol=1e-4, rtol=1e-5)


def test_two_searches_serve_forty_of_fifty_steps(monkeypatch):
    searches, state, kinds = [], {}, []
    counted = ops.block_mass

    def block_mass(*args, **kwargs):
        searches.append(step)
        return counted(*args, **kwargs)

    monkeypatch.setattr(adaspa.ops, "block_mass", block_mass)
    for step in range(50):
        ctx = layer(GRID, step=step, state=state)
        kinds.append(kind(call(AdaSpa(), ctx, *draw(ctx))[0]))
    assert searches == [10, 30]  # T_s; the second one without a dense pass
    assert kinds == ["dense"] * 10 + ["observed"] + ["sparse"] * 39  # T_w = 10


@pytest.mark.parametrize("kept_ratio", [1.0, 0.999])
def test_ratio_one_is_dense(kept_ratio):
    planner = AdaSpa(sparsity=1 - kept_ratio, head_adaptive=False, search=(0,), dense_steps=0)
    state = {}
    for step in range(2):
        ctx = layer(GRID, 11, step=step, state=state)
        q, k, v = draw(ctx, 2, 16, 2)
        found, out = call(planner, ctx, q, k, v)
        torch.testing.assert_close(out, vdit_fast.attention(q, k, v), atol=2e-6, rtol=1e-5)
    assert found.plan.density == 1


def test_top_k_blocks_hold_the_most_mass_of_all_choices_of_k():
    """The paper's theorem: for a given count per row, the blocks of largest W retain the most attention."""
    q, k, v = draw(layer(GRID), 2, 16)
    planner, ctx = AdaSpa(sparsity=0.7, block=32, head_adaptive=False), layer(GRID)
    mass = planner.mass(q, k, vdit_fast.attention(q, k, v, return_lse=True)[1], ctx)
    keep = planner.select(mass, ctx)
    count = int(keep.sum(-1).max())
    kept = (mass * keep).sum(-1)
    for _ in range(20):
        other = torch.rand_like(mass).topk(count, -1).indices
        assert (mass.gather(-1, other).sum(-1) <= kept + 1e-5).all()
    # ... and the plan retains exactly that mass of the exact weights
    weights = dense_weights(q, k) * planner.plan(q, k, ctx).to_mask()
    torch.testing.assert_close(weights.sum((-2, -1)), kept.double().sum(-1), atol=1e-3, rtol=1e-5)


RECALLS = (0.82, 0.4, 0.78, 0.9, 0.5, 0.6)  # of the heads, with the uniform budget; two exceed 0.8


def of_known_recall(blocks, block, top):
    """q, k, v of heads whose queries all weigh the key blocks alike, and these weights [H, blocks].

    The `top` heaviest blocks hold RECALLS of the mass, no two blocks the same, and lie anywhere.
    """
    tilt = torch.linspace(0.9, 1.1, top), torch.linspace(0.95, 1.05, blocks - top)
    shares = [torch.cat([r * tilt[0] / top, (1 - r) * tilt[1] / (blocks - top)]) for r in RECALLS]
    weights = torch.stack([share[torch.randperm(blocks)] for share in shares]).double()
    q, k, v = torch.randn(3, 1, blocks * block, len(RECALLS), 16).unbind()
    q[..., 0], k[..., 1:] = 4.0, 0.0  # the score is the key's first component
    k[0, :, :, 0] = (weights / block).log().float().repeat_interleave(block, 1).T
    return (q, k, v), weights


def test_budgets_follow_the_recall_of_the_heads():
    """s = 0.8, 20 blocks: the two heads above 0.8 keep (1 + s)/2 dropped, the two worst (3s - 1)/2, the others s."""
    block, top = 16, 4
    (q, k, v), weights = of_known_recall(20, block, top)
    grid, state, plans = (4, 8, 10), {}, []
    planner = AdaSpa(sparsity=0.8, block=block, search=(0, 2), dense_steps=0)
    for step in range(4):  # a search with its dense attention, one without, and steps that follow one
        found, _ = call(planner, layer(grid, step=step, num_steps=4, state=state), q, k, v)
        plans += [found.plan] if found.plan is not None else []
    assert len(plans) == 3
    kept = torch.tensor([round(20 * (1 - s)) for s in (0.9, 0.7, 0.8, 0.9, 0.7, 0.8)])
    for plan in (*plans, planner.plan(q, k, layer(grid))):
        rows = plan.to_mask()[0].view(6, 20, block, 20, block)
        assert torch.equal(rows.any(2).any(-1), rows.all(2).all(-1))  # whole blocks
        read = rows[:, :, 0, :, 0]
        assert torch.equal(read.sum(-1), kept[:, None].expand(6, 20))
        best = [weights[h] >= weights[h].sort().values[-int(kept[h])] for h in range(6)]
        assert torch.equal(read, torch.stack(best)[:, None].expand(6, 20, 20))
        assert plan.density == pytest.approx(0.2)  # the mean does not move
    plain = AdaSpa(sparsity=0.8, block=block, head_adaptive=False).plan(q, k, layer(grid))
    read = (dense_weights(q, k)[0] * plain.to_mask()[0]).sum(-1).mean(-1)
    torch.testing.assert_close(read, torch.tensor(RECALLS).double(), atol=1e-5, rtol=0)
