"""Real processes over gloo for the tests: many cases in one start, no fixed port, nobody waits for ever."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from preloaded import context


def _rank(
    fn: Callable[..., Any], rank: int, world: int, store: str, seconds: float, args: Any, end: Connection
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
        )
        end.send((True, fn(*args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        end.send((False, traceback.format_exc()))


def run(world: int, fn: Callable[..., Any], *args: Any, seconds: float = 90) -> list[Any]:
    """What ``fn(*args)`` returns on every rank of a fresh group; the first failure fails the test.

    Args:
        fn: a function of an importable module.
        seconds: after which everything is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            given = (fn, rank, world, str(Path(folder) / "store"), seconds, args, theirs)
            process = context.Process(target=_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        try:
            return _results(ends, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.join(2)
                if process.is_alive():
                    process.kill()
                    process.join(5)


def _results(ends: list[Connection], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ends):
        ready = wait([end for rank, end in enumerate(ends) if rank not in found], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(ends))) - set(found))} have not answered")
        for end in ready:
            rank = ends.index(end)  # type: ignore[arg-type]
            try:
                good, value = ends[rank].recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if not good:
                raise AssertionError(f"rank {rank}:\n{value}")
            found[rank] = value
    return [found[rank] for rank in range(len(ends))]
