"""Real ranks for tests: processes with torch.distributed over gloo, forked from one that has imported everything.

``start`` returns at once, ``Ranks.wait`` has a hard limit. A worker is a function ``(folder, **arguments)`` of a module
in tests/support; it runs after ``init_process_group`` and its output goes to ``folder/rank<r>.log``. The ranks of a
start have a parent of their own, which says how they ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from preloaded import context


class Ranks:
    """Started ranks."""

    def __init__(self, folder: Path, count: int, parent: BaseProcess) -> None:
        self.folder, self.count, self._parent = folder, count, parent

    @property
    def running(self) -> bool:
        """Whether any of them is still there."""
        return self._parent.is_alive()

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()

    def pids(self, seconds: float = 60.0) -> list[int]:
        """Process ids, once all ranks are there."""
        until = time.monotonic() + seconds
        while not (self.folder / "pids.json").is_file():
            assert time.monotonic() < until and self.running, "the ranks did not start"
            time.sleep(0.02)
        return json.loads((self.folder / "pids.json").read_text())

    def wait(self, seconds: float) -> list[int]:
        """Exit code of every rank; all are killed where they take longer."""
        self._parent.join(seconds)
        if self.running:
            self.kill()
            raise AssertionError(f"the ranks did not end within {seconds} s\n{self._logs()}")
        assert self._parent.exitcode == 0, "the ranks did not start"
        return json.loads((self.folder / "codes.json").read_text())

    def kill(self) -> None:
        """End all that are still there."""
        if self.running:
            try:
                os.killpg(self._parent.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet, and no rank
                self._parent.kill()
            self._parent.join()

    def finish(self, seconds: float = 120.0) -> None:
        """Wait; every rank must end well."""
        codes = self.wait(seconds)
        assert codes == [0] * self.count, f"exit codes {codes}\n{self._logs()}"

    def _logs(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.log(rank)}" for rank in range(self.count))


def start(worker: str, folder: Path, count: int, **arguments: Any) -> Ranks:
    """Start ``module:function`` on so many ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pids.json").unlink(missing_ok=True)
    parent = context.Process(target=_parent, args=(worker, folder, count, arguments), daemon=True)
    parent.start()
    return Ranks(folder, count, parent)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(rank: int, count: int, port: int, work: Any, folder: Path, arguments: dict[str, Any]) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=timedelta(seconds=60))
        work(folder, **arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads may sit in calls that wait for a dead rank


def _parent(worker: str, folder: Path, count: int, arguments: dict[str, Any]) -> None:
    os.setsid()  # the ranks are ended with it
    module, name = worker.split(":")
    work, port = getattr(importlib.import_module(module), name), _port()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _child(rank, count, port, work, folder, arguments)
        pids.append(pid)
    (folder / "pids.part").write_text(json.dumps(pids))
    os.replace(folder / "pids.part", folder / "pids.json")
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (folder / "codes.json").write_text(json.dumps(codes))
