"""plan_rows: a few rows of to_mask()."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.rows import plan_rows


def _plans() -> dict[str, AttentionPlan]:
    torch.manual_seed(0)
    blocks = torch.rand(2, 3, 5, 4) < 0.4
    sizes_q, sizes_k = torch.tensor([7, 0, 20, 1, 9]), torch.tensor([16, 0, 3, 18])
    orders = [torch.stack([torch.randperm(37) for _ in range(6)]).view(2, 3, 37) for _ in range(2)]
    clusters = AttentionPlan.from_clusters(
        blocks, sizes_q.expand(2, 3, 5), sizes_k.expand(2, 3, 4), orders[0], orders[1]
    )
    one_order = AttentionPlan.from_block_mask(blocks[0, :1], [7, 0, 20, 1, 9], [16, 0, 3, 18], q_order=orders[0][0, 0])
    mask = AttentionPlan.from_mask(torch.rand(1, 2, 37, 41) < 0.3, block=(8, 16))
    return {"clusters": clusters, "one order": one_order, "mask": mask, "dense": AttentionPlan.dense(37)}


@pytest.mark.parametrize("name", _plans())
def test_rows_of_the_whole_mask(name: str) -> None:
    plan = _plans()[name]
    whole = plan.to_mask()
    for rows in (torch.tensor([36, 0, 5, 5, 17]), torch.arange(plan.lq), torch.arange(0)):
        for batch in range(plan.batch):
            for head in range(plan.heads):
                assert torch.equal(plan_rows(plan, rows, batch=batch, head=head), whole[batch, head, rows])
    if plan.heads == 1:
        assert torch.equal(plan_rows(plan, rows, head=7), whole[0, 0, rows])


def test_heads_outside_the_plan() -> None:
    with pytest.raises(ValueError, match="head"):
        plan_rows(_plans()["mask"], torch.tensor([0]), head=2)
