"""The exchange of rows for heads: any number of heads, rows and ranks; what is sent; who sees what."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import threads
import torch
from torch import Tensor

from vdit_fast.models.heads import HeadsCall, enter_heads
from vdit_fast.models.row_shard import RowShard, equal_rows
from vdit_fast.parallel.ulysses import HeadSplit, Ulysses

SHAPES = [  # heads, key heads, ranks
    (8, 8, 2), (6, 6, 4), (5, 5, 3), (3, 3, 4), (1, 1, 3), (8, 2, 4), (6, 2, 4), (6, 3, 2), (9, 3, 4), (4, 1, 3),
    (2, 1, 5),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), SHAPES)
def test_every_head_is_computed_by_one_rank_that_has_its_keys(heads: int, kv_heads: int, ranks: int) -> None:
    split = HeadSplit(heads, kv_heads, ranks)
    own = [head for first, kept in zip(split.first, split.kept, strict=True) for head in range(first, first + kept)]
    assert own == list(range(heads))
    assert min(split.counts) >= 1 and max(split.counts) - min(split.counts) <= 1
    for rank in range(ranks):
        shard = split.of_rank(rank, lambda x: x)
        group = shard.count // len(shard.keys)
        assert shard.count % len(shard.keys) == 0
        for place in range(shard.count):
            assert shard.keys[place // group] == (shard.first + place) // (heads // kv_heads)
        sent = split.kv[rank]
        assert set(shard.keys) == set(sent) and list(sent) == sorted(set(sent)), "no key head is sent twice to a rank"


class Segments:
    """Adds further keys of all heads, as what makes them does: by the model's own projections."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.pair = k, v

    def __call__(self, call: HeadsCall, proceed: Any) -> Tensor:
        call.segments.append(self.pair)
        return proceed()

    def fresh(self) -> Segments:
        return self


def case(
    heads: int, kv_heads: int, rows: int, text: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v of [video, text]."""
    return [torch.randn(batch, rows + text, h, 8, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def run_ranks(
    monkeypatch: pytest.MonkeyPatch,
    qkv: list[Tensor],
    ranks: int,
    text: int,
    text_first: bool,
    inside: Any,
    kv_len: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[list[Tensor], list[threads.Rank]]:
    """Every rank's result, and the ranks. ``inside(call)`` is the attention."""
    sizes = equal_rows(qkv[0].shape[1] - text, ranks)

    def rank(group: threads.Rank) -> tuple[Tensor, threads.Rank]:
        shard = RowShard(sizes, group.rank, text_first)
        parts = [shard.parts_of_whole(x) for x in qkv]
        local = [shard.join(shard.own(video), words) for video, words in parts]
        around: dict[str, Any] = {"sequence": Ulysses(group, lambda call: shard)}  # type: ignore[arg-type]
        if segments is not None:
            around["segments"] = segments
        length = None if kv_len is None else kv_len - (sum(sizes) - shard.rows)
        call = HeadsCall(SimpleNamespace(around_heads=around), 0, *local, kv_len=length)  # type: ignore[arg-type]
        out = enter_heads(call, inside)
        assert (
            around["sequence"].bytes_sent
            == sum(each for sent in group.sent for to, each in enumerate(sent) if to != group.rank)
            * qkv[0].element_size()
        )
        return out, group

    found = threads.run(monkeypatch, ranks, rank)
    return [out for out, _ in found], [group for _, group in found]


def check(outs: list[Tensor], want: Tensor, text: int, text_first: bool) -> None:
    """Every rank has its rows of all heads, and all of the text."""
    ranks = len(outs)
    for rank, out in enumerate(outs):
        shard = RowShard(equal_rows(want.shape[1] - text, ranks), rank, text_first)
        video, words = shard.parts_of_whole(want)
        torch.testing.assert_close(out, shard.join(shard.own(video), words), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (5, False), (3, True)])
@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), SHAPES)
def test_equals_whole_attention(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, ranks: int, text: int, text_first: bool
) -> None:
    rows = 4 * ranks + ranks // 2  # uneven
    qkv = case(heads, kv_heads, rows, text, batch=3)
    kv_len = torch.tensor([rows + text, rows + text - 1, rows + text - 2]) if text and not text_first else None
    want = HeadsCall(None, 0, *qkv, kv_len=kv_len).dense()  # type: ignore[arg-type]

    def inside(call: HeadsCall) -> Tensor:
        assert call.q.shape[1] == call.k.shape[1] == rows + text
        assert call.heads is not None and call.heads.count == call.q.shape[2]
        first = call.heads.first
        torch.testing.assert_close(call.q, qkv[0][:, :, first : first + call.heads.count], rtol=0, atol=0)
        torch.testing.assert_close(call.v, call.heads.own_keys(qkv[2]), rtol=0, atol=0)
        if kv_len is not None:
            assert torch.equal(call.kv_len, kv_len)  # type: ignore[arg-type]
        return call.dense()

    outs, _ = run_ranks(monkeypatch, qkv, ranks, text, text_first, inside, kv_len)
    check(outs, want, text, text_first)


@pytest.mark.parametrize(("heads", "ranks"), [(8, 2), (8, 4), (6, 3)])
def test_bytes_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, heads: int, ranks: int) -> None:
    """(4 / N) · O(p · h) per layer: a rank keeps 1 / N of its p · h / N numbers of q, k, v and the result."""
    rows, batch = 6 * ranks, 2
    qkv = case(heads, heads, rows, batch=batch)
    _, groups = run_ranks(monkeypatch, qkv, ranks, 0, False, HeadsCall.dense)
    numbers = batch * rows * heads * 8
    for group in groups:
        sent = sum(each for sent in group.sent for to, each in enumerate(sent) if to != group.rank)
        assert sent == 4 * numbers // ranks * (ranks - 1) // ranks
        assert len(group.sent) == 2, "one exchange each way"


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(4, 4, 2), (5, 5, 4), (6, 2, 4)])
def test_a_segment_counts_once_however_many_ranks(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, ranks: int
) -> None:
    """Keys that every rank adds to its own rows would count once per rank: their logits would gain log P."""
    qkv, extra = case(heads, kv_heads, 3 * ranks + 1), [torch.randn(1, 7, kv_heads, 8).double() for _ in range(2)]
    want = HeadsCall(None, 0, *qkv, segments=[(extra[0], extra[1])]).dense()  # type: ignore[arg-type]
    outs, _ = run_ranks(monkeypatch, qkv, ranks, 0, False, HeadsCall.dense, segments=Segments(*extra))
    check(outs, want, 0, False)
    # what the trap would give: ranks copies of the segment, which is a bias of log P
    many = [(extra[0], extra[1])] * ranks
    wrong = HeadsCall(None, 0, *qkv, segments=many).dense()  # type: ignore[arg-type]
    scores = torch.cat([torch.einsum("bqhd,bkhd->bhqk", qkv[0], repeated(x, heads)) for x in (qkv[1], extra[0])], -1)
    scores[..., -7:] += math.sqrt(8) * math.log(ranks)
    values = torch.cat([repeated(x, heads).expand(2, -1, -1, -1) for x in (qkv[2], extra[1])], 1)
    biased = torch.einsum("bhqk,bkhd->bqhd", (scores / math.sqrt(8)).softmax(-1), values)
    torch.testing.assert_close(wrong, biased)
    assert (wrong - want).abs().max() > 1e-3


def repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2).expand(2, -1, -1, -1)


@pytest.mark.parametrize(("heads", "ranks"), [(6, 2), (7, 3), (2, 4)])
def test_gather_gives_every_rank_one_value_per_head(monkeypatch: pytest.MonkeyPatch, heads: int, ranks: int) -> None:
    qkv = case(heads, heads, 2 * ranks)
    whole = qkv[0].sum((1, 3))

    def inside(call: HeadsCall) -> Tensor:
        assert call.heads is not None
        torch.testing.assert_close(call.heads.gather(call.q.sum((1, 3))), whole)
        return call.dense()

    run_ranks(monkeypatch, qkv, ranks, 0, False, inside)


def test_rows_are_cut_as_tensor_split_does() -> None:
    for total, ranks in ((7, 3), (8, 4), (3, 3), (10, 4)):
        parts = torch.arange(total).tensor_split(ranks)
        assert equal_rows(total, ranks) == tuple(map(len, parts))
        for rank, part in enumerate(parts):
            shard = RowShard(equal_rows(total, ranks), rank)
            x = torch.arange(total)[None, :, None]
            assert torch.equal(shard.own(x)[0, :, 0], part) and torch.equal(shard.take(x, 1), shard.own(x))
            assert shard.take(x, 1) is shard.take(x, 1), "all blocks get one copy"
        for first in (False, True):
            shard = RowShard(equal_rows(total, ranks), 1, first)
            joint = torch.arange(total + 4)[None]
            video, text = shard.parts_of_whole(joint)
            assert torch.equal(shard.take_joint(joint, 1), shard.join(shard.own(video), text))
