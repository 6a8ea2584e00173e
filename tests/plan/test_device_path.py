"""The path without host reads: same plan as the CPU path, with capacity to spare."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_fast.plan import AttentionPlan, from_block_mask, from_classes, from_clusters, from_mask
from vdit_fast.plan.args import equal_lengths
from vdit_fast.plan.bits import block_words
from vdit_fast.plan.runs import compile_blocks_reference

FAST = settings(max_examples=40, deadline=None)
CPU = torch.device("cpu")


def same_work(a: AttentionPlan, b: AttentionPlan) -> None:
    """``a`` has what ``b`` has, then only unused capacity."""
    used, runs = len(b.tiles), len(b.runs)
    assert torch.equal(a.tiles[:used], b.tiles)
    assert (a.tiles[used:, 2] == 0).all()
    assert torch.equal(a.run_ptr[: used + 1], b.run_ptr) and (a.run_ptr[used:] == runs).all()
    assert torch.equal(a.runs[:runs, :2], b.runs[:, :2])


@FAST
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.sampled_from([None, 1, 4]), st.integers(0, 2**31))
def test_capacity_path_equals_trimmed_path(agrees, groups, nq, nk, q_tile, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(groups, nq, nk, generator=generator) < 0.6
    lq, lk = 17, 23
    q_len, kv_len = torch.zeros(groups, nq, dtype=torch.int64), torch.zeros(groups, nk, dtype=torch.int64)
    for lengths, total in ((q_len, lq), (kv_len, lk)):
        picks = torch.randint(0, lengths.shape[1], (groups, total), generator=generator)
        lengths.scatter_add_(1, picks, torch.ones_like(picks))
    plans = []
    for trim in (True, False):
        tensors = compile_blocks_reference(keep, q_len, kv_len, lq=lq, q_tile=q_tile, trim=trim)
        plans.append(AttentionPlan(1, groups, lq, lk, *tensors))
    agrees(plans[0], plans[0].to_mask())
    agrees(plans[1], plans[0].to_mask())
    same_work(plans[1], plans[0])
    assert len(plans[1].runs) == len(plans[1].tiles) * ((nk + 1) // 2)


@FAST
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**31))
def test_capacity_path_with_bits(agrees, lq, lk, bq, bk, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, lq, lk, generator=generator) < 0.5
    mask[:, : lq // 2, : lk // 2] = True
    rows, cols = equal_lengths(lq, bq, CPU), equal_lengths(lk, bk, CPU)
    trimmed = from_mask(mask, block=(bq, bk))
    words, offsets = block_words(mask, rows, cols, cols.tolist())
    cells = [[mask[:, i : i + bq, j : j + bk] for j in range(0, lk, bk)] for i in range(0, lq, bq)]
    full = torch.stack([torch.stack([c.flatten(1).all(1) for c in row], -1) for row in cells], 1)
    some = torch.stack([torch.stack([c.flatten(1).any(1) for c in row], -1) for row in cells], 1)
    tensors = compile_blocks_reference(
        full, rows[None], cols[None], lq=lq, partial=some & ~full, offsets=offsets, trim=False
    )
    plan = AttentionPlan(1, 2, lq, lk, *tensors, words)
    agrees(plan, mask[None])
    same_work(plan, trimmed)


def builders(device: str) -> dict[str, AttentionPlan]:
    mask = torch.zeros(2, 3, 40, 50, dtype=torch.bool, device=device)
    order = torch.zeros(2, 3, 40, dtype=torch.int64, device=device)
    sizes = torch.zeros(2, 3, 5, dtype=torch.int64, device=device)
    if device != "meta":
        mask.copy_(torch.rand(mask.shape) < 0.5)
        order.copy_(torch.rand(order.shape).argsort(-1))
        sizes += 8
    labels = order[:, 0] % 4
    lengths = sizes[0, 0]
    with_sync_check = device != "cpu" and device != "meta"
    if with_sync_check:
        torch.cuda.set_sync_debug_mode("error")
    try:
        plans = {
            "blocks": from_block_mask(mask, 8, 16, lq=317, lk=790),
            "lengths": from_block_mask(mask[..., :5, :5], lengths, lengths, lq=40, lk=40),
            "clusters": from_clusters(mask[..., :5, :5], sizes, sizes, order, order),
            "classes": from_classes(mask[0, 0, :4, :4], labels),
            "mask": from_mask(mask),
        }
        for plan in plans.values():
            _ = plan.density_per_head
    finally:
        if with_sync_check:
            torch.cuda.set_sync_debug_mode("default")
    return plans


def test_nothing_is_read_back():
    """Tensors without values: any look at one would raise."""
    for plan in builders("meta").values():
        assert plan.device.type == "meta" and plan.runs.shape[1] == 3
    lengths = torch.zeros(5, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="lq must be given"):
        from_block_mask(torch.zeros(5, 5, dtype=torch.bool, device="meta"), lengths, lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_builders_do_not_synchronise():
    torch.manual_seed(0)
    there = builders("cuda")
    torch.manual_seed(0)
    for name, plan in builders("cpu").items():
        assert torch.equal(there[name].validate().to_mask().cpu(), plan.to_mask()), name
        same_work(there[name].to("cpu"), plan)
    labels = torch.tensor([0, 1, 7, -1, 1], device="cuda")
    plan = from_classes(torch.ones(2, 2, dtype=torch.bool, device="cuda"), labels)
    inside = torch.tensor([1, 1, 0, 0, 1]).bool()
    assert torch.equal(plan.to_mask().cpu()[0, 0], inside[:, None] & inside[None, :])
