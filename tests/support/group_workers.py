"""What the ranks of tests do whose group, without any model, goes on while a process that is none of it ends."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from vdit_fast.parallel import RankFailed
from vdit_fast.parallel.collectives import all_sum
from vdit_fast.parallel.members import Members


def outsider(folder: Path) -> None:
    """Rank 0, which keeps the store, is none of the group and ends; later rank 1 ends, too, and rank 2 misses it."""
    rank, group = dist.get_rank(), dist.new_group([1, 2])
    members = Members(group, "the group", 2.0) if rank else None
    dist.barrier()
    if members is None:
        return
    assert members._watch is not None
    x, until = torch.ones(3), time.monotonic() + 20
    while members._watch.store_gone is None:
        assert time.monotonic() < until and members._watch.failure is None, "the store is still there, or missed"
        time.sleep(0.05)
    for _ in range(5):
        assert float(all_sum(x, group, members.run).sum()) == 6
        time.sleep(0.3)
    if rank == 2:
        try:
            all_sum(x, group, members.run)
        except RankFailed as caught:
            (folder / "error").write_text(str(caught))
