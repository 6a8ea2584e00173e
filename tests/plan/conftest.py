"""Plain-Python reading of a plan, against which everything here is compared."""

from collections.abc import Callable

import pytest
import torch

from vdit_fast.plan import AttentionPlan


def decode(plan: AttentionPlan) -> tuple[torch.Tensor, int]:
    """Mask in original order and the number of visited pairs, read entry by entry from the stored lists."""
    cells = [[[[False] * plan.lk for _ in range(plan.lq)] for _ in range(plan.heads)] for _ in range(plan.batch)]
    ptr, runs = plan.run_ptr.tolist(), plan.runs.tolist()
    words = [] if plan.mask_bits is None else [w & 0xFFFFFFFF for w in plan.mask_bits.tolist()]
    q_orders = None if plan.q_order is None else plan.q_order.tolist()
    kv_orders = None if plan.kv_order is None else plan.kv_order.tolist()
    visited = 0
    for t, (bh, q_start, q_len) in enumerate(plan.tiles.tolist()):
        b, h = divmod(bh, plan.heads)
        q_row = None if q_orders is None else q_orders[b % len(q_orders)][h % len(q_orders[0])]
        kv_row = None if kv_orders is None else kv_orders[b % len(kv_orders)][h % len(kv_orders[0])]
        for start, length, offset in runs[ptr[t] : ptr[t + 1]]:
            visited += q_len * length
            for i in range(q_len):
                row = cells[b][h][q_start + i if q_row is None else q_row[q_start + i]]
                for j in range(length):
                    if offset >= 0:
                        word = words[offset + i * ((length + 31) // 32) + j // 32]
                        if not word >> (j % 32) & 1:
                            continue
                    column = start + j if kv_row is None else kv_row[start + j]
                    assert not row[column], "a pair is listed twice"
                    row[column] = True
    return torch.tensor(cells), visited


def work(plan: AttentionPlan) -> list[int]:
    """Pairs of every tile, in the order of the tiles."""
    ptr, runs = plan.run_ptr.tolist(), plan.runs.tolist()
    return [
        q_len * sum(n for _, n, _ in runs[ptr[t] : ptr[t + 1]]) for t, (_, _, q_len) in enumerate(plan.tiles.tolist())
    ]


@pytest.fixture(scope="session")
def agrees() -> Callable[[AttentionPlan, torch.Tensor], None]:
    """Check a plan against the mask ``[batch, heads, lq, lk]`` it should stand for, in every way it can be read."""

    def check(plan: AttentionPlan, mask: torch.Tensor) -> None:
        assert plan.validate() is plan
        assert plan.shape == tuple(mask.shape)
        read, visited = decode(plan)
        assert torch.equal(read, mask)
        assert torch.equal(plan.to_mask(), mask)
        pairs = mask.numel()
        assert plan.density == pytest.approx(visited / pairs, abs=1e-12)
        assert plan.exact_density == pytest.approx(int(mask.sum()) / pairs, abs=1e-12)
        assert plan.density_per_head.shape == (plan.batch, plan.heads)
        tiles = work(plan)
        assert tiles == sorted(tiles, reverse=True)
        for order, which in ((plan.q_order, "q"), (plan.kv_order, "kv")):
            if order is not None:
                full = order.expand(plan.batch, plan.heads, -1).reshape(plan.batch * plan.heads, -1).long()
                there = torch.arange(full.shape[1]).expand_as(full)
                assert torch.equal(full.gather(1, plan.inverse_order(which)), there)

    return check
