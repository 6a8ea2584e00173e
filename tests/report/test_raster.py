"""The picture of a plan equals the mask of the plan, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.plan import AttentionPlan
from vdit_fast.report import plan_raster


def brute_force(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixel means of a bool mask [lq, lk]; every token is first cut into as many parts as there are pixels."""
    fine = mask.double().repeat_interleave(height, 0).repeat_interleave(width, 1)
    return fine.view(height, mask.shape[0], width, mask.shape[1]).mean(dim=(1, 3))


def permuted(mask: torch.Tensor, plan: AttentionPlan, batch: int = 0, head: int = 0) -> torch.Tensor:
    for axis, order in ((0, plan.q_order), (1, plan.kv_order)):
        if order is not None:
            row = order[min(batch, order.shape[0] - 1), min(head, order.shape[1] - 1)].long()
            mask = mask.index_select(axis, row)
    return mask


@pytest.mark.parametrize("max_pixels", [7, 16, 50, 1000])
def test_block_plan_of_every_batch_and_head(max_pixels):
    plan = AttentionPlan.from_block_mask(torch.rand(2, 3, 5, 4) < 0.4, 9, 16, lq=41, lk=60)
    mask = plan.to_mask()
    for batch in range(2):
        for head in range(3):
            found = plan_raster(plan, batch=batch, head=head, max_pixels=max_pixels)
            expected = brute_force(mask[batch, head], min(41, max_pixels), min(60, max_pixels))
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("max_pixels", [10, 64])
def test_permuted_plan_in_both_orders(max_pixels):
    plan = AttentionPlan.windows3d((4, 5, 6), (2, 3, 6), tile=(2, 2, 3), text=7)
    mask = plan.to_mask()[0, 0]
    size = min(plan.lq, max_pixels)
    found = plan_raster(plan, max_pixels=max_pixels)
    torch.testing.assert_close(found, brute_force(mask, size, size), atol=1e-12, rtol=0)
    found = plan_raster(plan, max_pixels=max_pixels, original_order=False)
    torch.testing.assert_close(found, brute_force(permuted(mask, plan), size, size), atol=1e-12, rtol=0)


def test_order_per_head():
    labels = torch.randint(0, 4, (2, 50))
    plan = AttentionPlan.from_classes(torch.rand(4, 4) < 0.5, labels)
    mask = plan.to_mask()
    for batch in range(plan.batch):
        found = plan_raster(plan, batch=batch, max_pixels=12)
        torch.testing.assert_close(found, brute_force(mask[batch, 0], 12, 12), atol=1e-12, rtol=0)


def test_masked_runs_count_their_bits():
    mask = torch.rand(70, 90) < 0.3
    mask[:32, :32] = True
    mask[64:, :] = False
    plan = AttentionPlan.from_mask(mask, block=(32, 30))
    found = plan_raster(plan, max_pixels=64)
    assert found.mean().item() == pytest.approx(mask.double().mean().item(), abs=1e-9)
    found = plan_raster(plan, max_pixels=1)
    assert found.item() == pytest.approx(mask.double().mean().item(), abs=1e-9)


def test_many_chunks_give_the_same_picture(monkeypatch):
    plan = AttentionPlan.from_block_mask(torch.rand(30, 30) < 0.3, 8, 8)
    whole = plan_raster(plan, max_pixels=31)
    monkeypatch.setattr("vdit_fast.report.raster.CHUNK_ELEMENTS", 100)
    torch.testing.assert_close(plan_raster(plan, max_pixels=31), whole, atol=1e-12, rtol=0)


def test_empty_plan_is_dark_and_dense_plan_is_bright():
    assert plan_raster(AttentionPlan.from_block_mask(torch.zeros(3, 3, dtype=torch.bool), 8, 8)).max() == 0
    assert plan_raster(AttentionPlan.dense(300, 200), max_pixels=64).min() > 1 - 1e-12


def test_long_plan_stays_small():
    count = 100_000 // 400
    plan = AttentionPlan.from_block_mask(torch.rand(count, count) < 0.1, 400, 400)
    assert plan_raster(plan).mean().item() == pytest.approx(plan.density, abs=1e-9)


def test_bad_head_is_named():
    plan = AttentionPlan.dense(16, heads=2)
    with pytest.raises(ValueError, match="head 2 of batch 0"):
        plan_raster(plan, head=2)
    with pytest.raises(ValueError, match="max_pixels is 0"):
        plan_raster(plan, max_pixels=0)
