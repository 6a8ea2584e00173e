"""AttentionPlan: which key ranges every query tile reads, per batch item and head."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .bits import popcount, unpack_rows
from .check import check_plan
from .runs import INT32_MAX
from .stand_ins import StandIns


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A sparse (or dense) attention pattern in the form the executor reads.

    The logical shape is ``(batch, heads, lq, lk)``; ``batch`` and ``heads`` may be 1 and then hold for every batch
    item or query head of the tensors. All tensors are contiguous and on one device.

    Attributes:
        batch, heads, lq, lk: logical shape, each at least 1.
        tiles: int32 ``[T, 3]`` rows ``(bh, q_start, q_len)``, ``bh = b * heads + h`` in the plan's own dimensions,
            longest work first. ``q_len`` may be any length (executors split long tiles) and 0 marks unused capacity.
        run_ptr: int32 ``[T + 1]``; tile ``t`` owns ``runs[run_ptr[t]:run_ptr[t + 1]]``.
        runs: int32 ``[R, 3]`` rows ``(kv_start, kv_len, mask)``. ``mask`` is -1 for a full run, else an offset into
            ``mask_bits``. Rows beyond ``run_ptr[-1]`` are unused capacity.
        mask_bits: int32 ``[W]`` or None. A partial run of ``n`` keys in a tile of ``m`` rows has ``m`` rows of
            ``ceil(n / 32)`` words; bit ``j % 32`` of word ``j // 32`` of row ``i`` is set when query ``q_start + i``
            may read key ``kv_start + j``. Bits past ``n`` are 0. Several runs may share one offset.
        q_order, kv_order: int32 ``[1|batch, 1|heads, lq]`` and ``[..., lk]`` or None. Position ``p`` of the permuted
            sequence holds original token ``order[p]``; tiles and runs count permuted positions.
        segments: lengths of extra dense key/value segments that the attention call must bring; with () it may
            bring any.
        stand_ins: mean keys and values that stand in for blocks of keys that a query does not read, or None.

    Tiles of one ``bh`` are disjoint. Runs of one tile are sorted by ``kv_start``, disjoint, of at least one key, and
    full neighbours are merged. A row in no tile, or whose tile has no run, is an empty row: output 0, log-sum-exp
    -inf.
    """

    batch: int
    heads: int
    lq: int
    lk: int
    tiles: Tensor
    run_ptr: Tensor
    runs: Tensor
    mask_bits: Tensor | None = None
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    segments: tuple[int, ...] = ()
    stand_ins: StandIns | None = None

    # Constructors of this package, bound in plan/__init__.py.
    dense: ClassVar[Callable[..., AttentionPlan]]
    from_block_mask: ClassVar[Callable[..., AttentionPlan]]
    from_clusters: ClassVar[Callable[..., AttentionPlan]]
    from_mask: ClassVar[Callable[..., AttentionPlan]]
    windows3d: ClassVar[Callable[..., AttentionPlan]]
    block_causal: ClassVar[Callable[..., AttentionPlan]]
    from_classes: ClassVar[Callable[..., AttentionPlan]]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.tiles.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, lq, lk)``."""
        return self.batch, self.heads, self.lq, self.lk

    @property
    def nbytes(self) -> int:
        """Bytes held by the plan's tensors."""
        own = sum(t.numel() * t.element_size() for t in self.op_args() if t is not None)
        return own + (self.stand_ins.plan.nbytes if self.stand_ins is not None else 0)

    @property
    def density_per_head(self) -> Tensor:
        """Visited pairs / all pairs, float64 ``[batch, heads]`` on the plan's device (no host synchronisation).

        A stand-in counts as one key.
        """
        read = self._keys_before(self.run_ptr.long())
        keys = read[1:] - read[:-1]
        pairs = torch.zeros(self.batch * self.heads, dtype=torch.int64, device=self.device)
        pairs.index_add_(0, self.tiles[:, 0].long(), keys * self.tiles[:, 2])
        found = (pairs.double() / (self.lq * self.lk)).view(self.batch, self.heads)
        if self.stand_ins is not None:
            found = found + self.stand_ins.plan.density_per_head * (self.stand_ins.plan.lk / self.lk)
        return found

    @property
    def density(self) -> float:
        """Pairs the executor visits / (batch * heads * lq * lk).

        A partial run counts whole, a stand-in as one key; segments do not count.
        """
        return float(self.density_per_head.mean())

    @property
    def exact_density(self) -> float:
        """Like ``density``, but a partial run counts its set bits: the mean of ``to_mask()``."""
        tile, runs = self._used_runs()
        pairs = int((runs[:, 1] * self.tiles[tile, 2])[runs[:, 2] < 0].sum())
        if self.mask_bits is not None:
            tile, runs = tile[runs[:, 2] >= 0], runs[runs[:, 2] >= 0]
            ones = torch.zeros(len(self.mask_bits) + 1, dtype=torch.int64, device=self.device)
            torch.cumsum(popcount(self.mask_bits), 0, out=ones[1:])
            words = self.tiles[tile, 2] * ((runs[:, 1] + 31) // 32)
            pairs += int((ones[runs[:, 2] + words] - ones[runs[:, 2]]).sum())
        return pairs / (self.batch * self.heads * self.lq * self.lk)

    def validate(self) -> AttentionPlan:
        """Check everything an executor relies on; returns the plan. Reads values back to the host.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        check_plan(self)
        return self

    def op_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``(tiles, run_ptr, runs, mask_bits, q_order, kv_order)``, the tensors an attention operator takes."""
        return self.tiles, self.run_ptr, self.runs, self.mask_bits, self.q_order, self.kv_order

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan with its tensors on ``device``."""
        return replace(
            self,
            tiles=self.tiles.to(device),
            run_ptr=self.run_ptr.to(device),
            runs=self.runs.to(device),
            mask_bits=None if self.mask_bits is None else self.mask_bits.to(device),
            q_order=None if self.q_order is None else self.q_order.to(device),
            kv_order=None if self.kv_order is None else self.kv_order.to(device),
            stand_ins=None if self.stand_ins is None else self.stand_ins.to(device),
        )

    def with_segments(self, lengths: Sequence[int]) -> AttentionPlan:
        """The same plan for calls that bring extra dense K/V segments of these lengths (each at least 1)."""
        given = tuple(lengths)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
            raise ValueError(f"segments must be lengths of at least 1 token, got {given}; leave out empty segments")
        return replace(self, segments=given)

    def to_mask(self, *, permuted: bool = False) -> Tensor:
        """The pattern as bool ``[batch, heads, lq, lk]``, True where a query reads a key.

        In original token order, or with ``permuted=True`` in the order of the tiles. Segments and stand-ins are not
        part of it. The memory is that of the full mask: meant for tests and small shapes.
        """
        groups, device = self.batch * self.heads, self.device
        tile, runs = self._used_runs()
        edges = torch.zeros(len(self.tiles) + 1, self.lk + 1, dtype=torch.int32, device=device)
        full = runs[:, 2] < 0
        one = torch.ones(int(full.sum()), dtype=torch.int32, device=device)
        edges.index_put_((tile[full], runs[full, 0]), one, accumulate=True)
        edges.index_put_((tile[full], runs[full, 0] + runs[full, 1]), -one, accumulate=True)
        reads = edges.cumsum(1)[:, : self.lk] > 0  # [T + 1, lk]; the last row is "no tile" and reads nothing

        start, rows = self.tiles[:, 1].long(), self.tiles[:, 2].long()
        member = torch.repeat_interleave(torch.arange(len(rows), device=device), rows)
        inside = torch.arange(len(member), device=device) - (rows.cumsum(0) - rows)[member]
        tile_of = torch.full((groups * self.lq,), len(rows), device=device)
        tile_of[self.tiles[member, 0].long() * self.lq + start[member] + inside] = member
        mask = reads[tile_of]

        if self.mask_bits is not None:
            tile, runs = tile[~full], runs[~full]
            for length in runs[:, 1].unique().tolist():
                here = runs[:, 1] == length
                self._add_bits(mask, tile[here], runs[here], length)
        mask = mask.view(groups, self.lq, self.lk)
        if not permuted:
            if self.q_order is not None:
                mask = mask.gather(1, self.inverse_order("q")[:, :, None].expand_as(mask))
            if self.kv_order is not None:
                mask = mask.gather(2, self.inverse_order("kv")[:, None, :].expand_as(mask))
        return mask.view(self.batch, self.heads, self.lq, self.lk)

    def inverse_order(self, which: str) -> Tensor:
        """Permuted position of every original token: int64 ``[batch * heads, lq or lk]``; ``which`` is "q" or "kv"."""
        order, length = (self.q_order, self.lq) if which == "q" else (self.kv_order, self.lk)
        if order is None:
            return torch.arange(length, device=self.device).expand(self.batch * self.heads, length)
        return order.expand(self.batch, self.heads, length).reshape(-1, length).long().argsort(-1)

    def draw(self, *, batch: int = 0, head: int = 0, width: int = 48) -> str:
        """Text picture of one head in tile order: rows are queries, columns keys, darker means more read pairs."""
        from .draw import draw_plan

        return draw_plan(self, batch=batch, head=head, width=width)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a ``.npz`` file (the path is used as given)."""
        from .io import save_plan

        save_plan(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> AttentionPlan:
        """Read a plan written by ``save``. Raises ValueError for a file that is not a plan."""
        from .io import load_plan

        return load_plan(path, device=device)

    def __or__(self, other: object) -> AttentionPlan:
        """Union: a query reads a key when it does in either plan. See ``plan.union``."""
        if not isinstance(other, AttentionPlan):
            return NotImplemented
        from .union import union

        return union(self, other)

    def __repr__(self) -> str:
        batch, heads, lq, lk = self.shape
        extra = f", segments={self.segments}" if self.segments else ""
        extra += ", stand-ins" if self.stand_ins is not None else ""
        order = ", permuted" if self.q_order is not None or self.kv_order is not None else ""
        return (
            f"AttentionPlan(batch={batch}, heads={heads}, lq={lq}, lk={lk}, "
            f"tiles={len(self.tiles)}, runs={len(self.runs)}{order}{extra}, device={self.device})"
        )

    def _keys_before(self, run: Tensor) -> Tensor:
        """Keys in all runs before each of the used runs ``run`` int64 ``[P]``: int64 ``[P]``.

        Sums of short chunks of runs, then the rest of a chunk: on a GPU the runs are capacity, often hundreds of MB,
        and an int64 prefix sum over all of them nearly as much again.
        """
        count = len(self.runs)
        if count == 0:
            return torch.zeros_like(run)
        width = max(1, min(32, INT32_MAX // self.lk))  # a run has at most lk keys: int32 holds a chunk's sum
        chunks, length = count // width, self.runs[:, 1]
        whole = length[: chunks * width].view(chunks, width).sum(1, dtype=torch.int32)
        before = torch.zeros(chunks + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(whole, 0, out=before[1:])
        inside = torch.arange(width, device=self.device)
        chunk, rest = run // width, (run % width)[:, None]
        place = (chunk[:, None] * width + inside).clamp_(max=count - 1)
        return before[chunk] + length[place].masked_fill_(inside >= rest, 0).sum(1, dtype=torch.int32)

    def _used_runs(self) -> tuple[Tensor, Tensor]:
        """(tile index of each run, the runs), both int64 and without unused capacity. Synchronises."""
        counts = (self.run_ptr[1:] - self.run_ptr[:-1]).long()
        tile = torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts)
        return tile, self.runs[: len(tile)].long()

    def _add_bits(self, mask: Tensor, tile: Tensor, runs: Tensor, length: int) -> None:
        """Write the bits of partial runs of one length into ``mask`` bool ``[batch * heads * lq, lk]``."""
        assert self.mask_bits is not None
        rows, device = self.tiles[tile, 2].long(), mask.device
        run = torch.repeat_interleave(torch.arange(len(rows), device=device), rows)
        inside = torch.arange(len(run), device=device) - (rows.cumsum(0) - rows)[run]
        words = (length + 31) // 32
        at = (runs[run, 2] + inside * words)[:, None] + torch.arange(words, device=device)
        head, start = self.tiles[tile, 0].long()[run], self.tiles[tile, 1].long()[run]
        target = (head * self.lq + start + inside)[:, None]
        columns = runs[run, 0][:, None] + torch.arange(length, device=device)
        mask[target, columns] = unpack_rows(self.mask_bits[at], length)
