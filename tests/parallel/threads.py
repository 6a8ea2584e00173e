"""Ranks as threads of this process, for the arithmetic of exchanges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vdit_fast.parallel import ulysses


class Rank:
    """One rank's end of a group."""

    def __init__(self, rank: int, ranks: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.ranks = rank, ranks
        self.sent: list[list[int]] = []
        """Elements to every rank, per exchange."""
        self._board, self._barrier = board, barrier

    def _all(self, mine: Any) -> list[Any]:
        self._barrier.wait(20)
        self._board[self.rank] = mine
        self._barrier.wait(20)
        return list(self._board)

    def all_to_all(self, buffer: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert buffer.ndim == 1 and buffer.is_contiguous() and sum(send) == buffer.numel()
        self.sent.append(list(send))
        parts = self._all(buffer.split(list(send)))
        found = [part[self.rank] for part in parts]
        assert [part.numel() for part in found] == list(receive)
        return torch.cat(found)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        parts = self._all(x)
        assert [part.shape[dim] for part in parts] == list(sizes)
        return torch.cat(parts, dim)


def run(monkeypatch: pytest.MonkeyPatch, ranks: int, fn: Callable[[Rank], Any]) -> list[Any]:
    """What ``fn`` returns for every rank; ``ulysses`` exchanges between the threads meanwhile."""
    names = SimpleNamespace(get_rank=lambda group: group.rank, get_world_size=lambda group: group.ranks)
    monkeypatch.setattr(ulysses, "dist", names)
    monkeypatch.setattr(ulysses, "all_to_all", lambda x, send, receive, group, run: group.all_to_all(x, send, receive))
    monkeypatch.setattr(ulysses, "all_gather", lambda x, sizes, dim, group, run: group.all_gather(x, sizes, dim))
    board: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks)
    found: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            found[rank] = fn(Rank(rank, ranks, board, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in real or errors:
        raise error
    return found
