"""Ulysses (arXiv 2309.14509) around attention: a rank's rows of all heads become all rows of its heads, and back.

Whatever lies further inside sees whole sequences in the model's order: planners, K/V caches, further keys and hooks
work as in one process, on some of the heads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from vdit_fast.context import HeadShard
from vdit_fast.ops.pack import pack_slices, unpack_slices
from vdit_fast.parallel.collectives import Run, all_gather, all_sum, all_to_all, at_once

if TYPE_CHECKING:
    from vdit_fast.models.heads import HeadsCall
    from vdit_fast.models.row_shard import RowShard

__all__ = ["HeadSplit", "Ulysses"]


@dataclass(frozen=True)
class HeadSplit:
    """Which heads every rank computes. Neighbours differ by at most one head; where there are fewer heads than ranks,
    the last head is computed by several ranks, and the first of them has the say."""

    heads: int
    kv_heads: int
    ranks: int

    @functools.cached_property
    def first(self) -> tuple[int, ...]:
        """The first query head of every rank."""
        if self.heads < self.ranks:
            return tuple(min(rank, self.heads - 1) for rank in range(self.ranks))
        return tuple(self.heads * rank // self.ranks for rank in range(self.ranks))

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """Query heads of every rank, at least 1."""
        if self.heads < self.ranks:
            return (1,) * self.ranks
        return tuple(b - a for a, b in itertools.pairwise((*self.first, self.heads)))

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """Query heads of every rank whose result counts."""
        return tuple(count if rank < self.heads else 0 for rank, count in enumerate(self.counts))

    @functools.cached_property
    def kv(self) -> tuple[tuple[int, ...], ...]:
        """The key heads that every rank's query heads read, in order."""
        group = self.heads // self.kv_heads
        return tuple(
            tuple(range(first // group, (first + count - 1) // group + 1))
            for first, count in zip(self.first, self.counts, strict=True)
        )

    @functools.cached_property
    def kv_counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.kv))

    @functools.cached_property
    def sent(self) -> tuple[int, ...]:
        """The query heads that are sent to the ranks, one rank after the other."""
        ranges = (range(first, first + count) for first, count in zip(self.first, self.counts, strict=True))
        return tuple(itertools.chain.from_iterable(ranges))

    @functools.cached_property
    def kv_sent(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(self.kv))

    def pairs(self, rank: int) -> tuple[int, ...] | None:
        """Key head among the rank's own of each of its query heads, None where a kernel knows by itself: every key
        head has equally many query heads."""
        group, own = self.heads // self.kv_heads, self.kv[rank]
        heads = range(self.first[rank], self.first[rank] + self.counts[rank])
        pairs = tuple(head // group - own[0] for head in heads)
        even = [i * len(own) // len(pairs) for i in range(len(pairs))] if len(pairs) % len(own) == 0 else []
        return None if list(pairs) == even else pairs

    def of_rank(self, rank: int, gather: Callable[[Tensor], Tensor]) -> HeadShard:
        pairs, own = self.pairs(rank), self.kv[rank]
        keys = own if pairs is None else tuple(own[pair] for pair in pairs)
        return HeadShard(self.first[rank], self.counts[rank], self.heads, keys, self.kv_heads, gather)


def _of_heads(x: Tensor, wanted: Sequence[int]) -> Tensor:
    """x [B, n, H, D] with these heads: a view where they are neighbours."""
    first, count = wanted[0], len(wanted)
    if list(wanted) == list(range(first, first + count)):
        return x.narrow(2, first, count)
    return x.index_select(2, torch.tensor(wanted, device=x.device))


class Ulysses:
    """Stands around attention ("sequence", outermost) of one transformer whose rows are shared by a group.

    Args:
        group: the ranks, in the order of their rows.
        rows: which rows of the call's sequence this rank has; None: all, and nothing is exchanged.
        run: runs the exchanges.
    """

    def __init__(
        self, group: dist.ProcessGroup, rows: Callable[[HeadsCall], RowShard | None], run: Run = at_once
    ) -> None:
        self.group = group
        self.rows = rows
        self.run = run
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.calls = 0
        self.bytes_sent = 0
        """To other ranks, by these calls."""

    def fresh(self) -> Ulysses:
        return Ulysses(self.group, self.rows, self.run)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks, on all ranks."""
        return all_sum(x, self.group, self.run)

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        shard = self.rows(call)
        if shard is None:
            return proceed()
        text = call.q.shape[1] - shard.rows
        split = _split(call.q.shape[2], call.k.shape[2], self.ranks)
        self.calls += 1
        self._to_heads(call, shard, split, text)
        return self._to_rows(proceed(), shard, split, text)

    def _to_heads(self, call: HeadsCall, shard: RowShard, split: HeadSplit, text: int) -> None:
        """The call's own rows of all heads become all rows of the own heads."""
        rank = self.rank
        inputs = (call.q, call.k, call.v)
        wanted = [split.sent, split.kv_sent, split.kv_sent]
        counts = [split.counts, split.kv_counts, split.kv_counts]
        parts = [shard.parts(x) for x in inputs]
        video = [_of_heads(part[0], heads) for part, heads in zip(parts, wanted, strict=True)]
        batch, width = call.q.shape[0], call.q.shape[3]
        send = [batch * shard.rows * width * sum(each) for each in zip(*counts, strict=True)]
        receive = [batch * size * width * sum(each[rank] for each in counts) for size in shard.sizes]
        buffer = self._exchange(pack_slices(video, counts, 2), send, receive)
        shapes = [[batch, shard.total, each[rank], width] for each in counts]
        whole = unpack_slices(buffer, shapes, shard.sizes, 1)
        if text:
            own = (range(split.first[rank], split.first[rank] + split.counts[rank]), split.kv[rank], split.kv[rank])
            rest = [_of_heads(part[1], list(heads)) for part, heads in zip(parts, own, strict=True)]
            whole = [shard.join(*pair) for pair in zip(whole, rest, strict=True)]
        pairs = split.pairs(rank)
        call.q, call.k, call.v = whole[0], *(x if pairs is None else _of_heads(x, pairs) for x in whole[1:])
        if call.kv_len is not None:
            call.kv_len = call.kv_len + (shard.total - shard.rows)
        call.heads = split.of_rank(
            rank, lambda x: all_gather(x[:, : split.kept[rank]], split.kept, 1, self.group, self.run)
        )

    def _to_rows(self, out: Tensor, shard: RowShard, split: HeadSplit, text: int) -> Tensor:
        """All rows of the own heads become the own rows of all heads. Every rank gets the text's rows."""
        batch, _, _, width = out.shape
        kept = split.kept[self.rank]
        whole = [out[:, :, :kept]]
        sizes = [shard.sizes]
        shapes = [[batch, shard.rows, split.heads, width]]
        if text:
            video, rest = shard.parts_of_whole(whole[0])
            whole, sizes = [video, rest.repeat(1, self.ranks, 1, 1)], [shard.sizes, (text,) * self.ranks]
            shapes.append([batch, text, split.heads, width])
        each = batch * width
        send = [each * kept * (size + text) for size in shard.sizes]
        receive = [each * count * (shard.rows + text) for count in split.kept]
        buffer = self._exchange(pack_slices(whole, sizes, 1), send, receive)
        found = unpack_slices(buffer, shapes, split.kept, 2)
        return found[0] if not text else shard.join(*found)

    def _exchange(self, buffer: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.bytes_sent += (sum(send) - send[self.rank]) * buffer.element_size()
        return all_to_all(buffer, send, receive, self.group, self.run)


@functools.cache
def _split(heads: int, kv_heads: int, ranks: int) -> HeadSplit:
    return HeadSplit(heads, kv_heads, ranks)
