"""Densities and bit lists at capacity: exact, and without buffers larger than what they read or return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.bits import pack_columns, unpack_rows
from vdit_fast.plan.runs import compile_blocks_reference


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operator makes, views left aside."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


def capacity_plan(groups: int, nq: int, nk: int, seed: int) -> tuple[AttentionPlan, Tensor]:
    """A plan as a GPU makes it, its unused runs full of rubbish, and its density per head."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(groups, nq, nk, generator=generator) < torch.rand(groups, nq, 1, generator=generator)
    q_len = torch.randint(0, 5, (groups, nq), generator=generator)
    kv_len = torch.randint(0, 9, (groups, nk), generator=generator)
    q_len[:, -1] += int(q_len.sum(-1).max()) + 1 - q_len.sum(-1)
    kv_len[:, -1] += int(kv_len.sum(-1).max()) + 1 - kv_len.sum(-1)
    lq, lk = int(q_len[0].sum()), int(kv_len[0].sum())
    tiles, run_ptr, runs = compile_blocks_reference(keep, q_len, kv_len, lq=lq, trim=False)
    runs[int(run_ptr[-1]) :] = torch.iinfo(torch.int32).max
    pairs = (keep * q_len[:, :, None] * kv_len[:, None]).sum((1, 2))
    return AttentionPlan(1, groups, lq, lk, tiles, run_ptr, runs), (pairs.double() / (lq * lk))[None]


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (3, 2), (7, 63), (9, 64), (9, 65), (5, 400), (130, 131)])
def test_density_of_many_runs_and_unused_capacity(nq: int, nk: int) -> None:
    for seed in range(3):
        plan, want = capacity_plan(3, nq, nk, seed)
        assert torch.equal(plan.density_per_head, want)


def test_density_of_no_runs_and_of_sums_beyond_int32() -> None:
    empty = AttentionPlan.from_block_mask(torch.zeros(2, 3, 3, dtype=torch.bool), 4, 4)
    assert len(empty.runs) == 0 and torch.equal(empty.density_per_head, torch.zeros(1, 2).double())
    rows, lk = 40, 2**30 + 7  # 32 runs of one chunk hold 2^35 keys
    index = torch.arange(rows, dtype=torch.int32)
    tiles = torch.stack([torch.zeros_like(index), index, torch.ones_like(index)], 1)
    runs = torch.tensor([[0, lk, -1]], dtype=torch.int32).repeat(rows, 1)
    run_ptr = torch.arange(rows + 1, dtype=torch.int32)
    assert AttentionPlan(1, 1, rows, lk, tiles, run_ptr, runs).density_per_head.tolist() == [[1.0]]


def test_density_makes_nothing_as_large_as_the_runs() -> None:
    plan, want = capacity_plan(2, 40, 2000, 0)
    with Largest() as largest:
        found = plan.density_per_head
    assert torch.equal(found, want)
    assert largest.nbytes < plan.runs.nbytes / 12, "not even a byte per run"


def test_unpacking_makes_nothing_larger_than_its_result() -> None:
    mask = torch.rand(300, 1000) < 0.5
    words = pack_columns(mask[None], [1000])[0]
    with Largest() as largest:
        found = unpack_rows(words, 1000)
    assert torch.equal(found, mask)
    assert largest.nbytes == 300 * 1024
