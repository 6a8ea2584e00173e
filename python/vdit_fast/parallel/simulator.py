"""Predicts the stage pipeline of DualParal (sheet section 5; arXiv 2505.21070): latency, idle time, messages.

A video is a queue of frame blocks, the oldest and cleanest at its head. Iteration i gives every queued block one
denoising step, tail to head; block b enters in iteration b and leaves after ``steps`` of them, so there are
``steps + blocks - 1`` iterations and ``steps * blocks`` forwards. A forward passes all ranks in turn and returns to
rank 0. It starts once rank 0 has the last results of its own block and of the cleaner neighbour. Every rank works
through the forwards in the same order, so the pipeline is a line of stations, ranks and links, each first come, first
served.

    python -m vdit_fast.parallel.simulator --help
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vdit_fast.parallel.schedule import Schedule

__all__ = ["Forward", "Link", "Pipeline", "Prediction", "forwards", "simulate"]


@dataclass(frozen=True)
class Link:
    """What connects a rank with the next one, and the last with the first.

    Args:
        bytes_per_second: a message keeps its link busy for bytes / bytes_per_second.
        latency: seconds that pass besides; several messages may be under way.
        overlap: whether the sender computes meanwhile; otherwise it waits until its message is on the way.
    """

    bytes_per_second: float = math.inf
    latency: float = 0.0
    overlap: bool = True

    def seconds(self, size: float) -> float:
        return size / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward: its number, block and step, whether the block is the noisiest of the queue, how many results rank 0
    must have before it, and how many of them are new."""

    number: int
    block: int
    step: int
    newest: bool
    needs: int
    updates: int


@dataclass(frozen=True)
class Pipeline:
    """What is simulated. Seconds are those of a forward of one frame block, all guidance branches together.

    Args:
        steps: denoising steps of every block (T).
        blocks: frame blocks of the video.
        stage: of the layers of each rank; its length is the number of ranks.
        embed: of rank 0 before its layers: patches, time and text.
        head: of the last rank after its layers: output layer, guidance.
        update: of rank 0 per result: the scheduler's step.
        hop_bytes: a message from a rank to the next one.
        return_bytes: a message from the last rank to rank 0.
        first_return_bytes: the same for the first block, which is longer. None: return_bytes.
        link: every connection.
        newest: factor of ``stage`` for the noisiest block of the queue, which has no noisier neighbour to read.
        cores: processors that all ranks share evenly while more ranks compute than there are, as processes of one
            machine do. None: a processor for every rank.
    """

    steps: int
    blocks: int
    stage: Sequence[float]
    embed: float = 0.0
    head: float = 0.0
    update: float = 0.0
    hop_bytes: float = 0.0
    return_bytes: float = 0.0
    first_return_bytes: float | None = None
    link: Link = field(default_factory=Link)
    newest: float = 1.0
    cores: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; pass at least 1")
        if not self.stage:
            raise ValueError("stage is empty; pass the seconds of every rank")
        seconds = [*self.stage, self.embed, self.head, self.update, self.hop_bytes, self.return_bytes]
        seconds += [self.first_return_bytes or 0.0, self.link.latency, self.newest]
        if not all(0 <= s < math.inf for s in seconds):
            raise ValueError("seconds, bytes, latencies and factors must be finite and at least 0")
        if not self.link.bytes_per_second > 0:
            raise ValueError(f"link.bytes_per_second is {self.link.bytes_per_second}; pass more than 0")
        if self.cores is not None and not self.cores > 0:
            raise ValueError(f"cores is {self.cores}; pass more than 0, or None")

    @property
    def ranks(self) -> int:
        return len(self.stage)

    def result_bytes(self, block: int) -> float:
        """Of the message that brings a result of a block back."""
        first = self.return_bytes if self.first_return_bytes is None else self.first_return_bytes
        return self.return_bytes if block else first

    def on_links(self, forward: Forward) -> list[float]:
        """Seconds that a forward keeps the link behind each rank busy."""
        if self.ranks == 1:
            return [0.0]
        return [self.link.seconds(self.hop_bytes)] * (self.ranks - 1) + [
            self.link.seconds(self.result_bytes(forward.block))
        ]

    def work(self, forward: Forward) -> list[float]:
        """Seconds that a forward keeps each rank busy."""
        cost = self.newest if forward.newest else 1.0
        seconds = [s * cost for s in self.stage]
        seconds[0] += self.embed + forward.updates * self.update
        seconds[-1] += self.head
        return seconds


@dataclass(frozen=True)
class Prediction:
    """What comes of it.

    Attributes:
        latency: seconds until the last block is done.
        block_done: ``[blocks]`` seconds until each block is done.
        busy: ``[ranks]`` seconds of work.
        last_work: ``[ranks]`` when each rank has finished its last forward.
        iterations, messages, bytes: of the whole run.
    """

    latency: float
    block_done: npt.NDArray[np.float64]
    busy: npt.NDArray[np.float64]
    last_work: npt.NDArray[np.float64]
    iterations: int
    messages: int
    bytes: float

    @property
    def first_block(self) -> float:
        """Seconds until the first block is done."""
        return float(self.block_done[0])

    @property
    def idle(self) -> npt.NDArray[np.float64]:
        """Seconds that each rank does not work, the filling and the draining included."""
        return self.latency - self.busy

    @property
    def bubble(self) -> float:
        """Mean idle fraction of the ranks."""
        return float(self.idle.mean() / self.latency) if self.latency else 0.0


def forwards(steps: int, blocks: int) -> Iterator[Forward]:
    """All forwards in their order, which is the same on every rank."""
    latest = [-1] * blocks  # the number of a block's last forward
    known, iteration = 0, -1
    for number, item in enumerate(Schedule(steps, blocks, num_per_block=1, num_cat=0).items()):
        newest, iteration = item.iteration != iteration, item.iteration
        needs = max(latest[item.block], latest[item.block - 1] if item.block else -1) + 1
        yield Forward(number, item.block, item.step, newest, needs, max(0, needs - known))
        known = max(known, needs)
        latest[item.block] = number


def simulate(pipeline: Pipeline, work: Sequence[Sequence[float]] | None = None) -> Prediction:
    """Runs the schedule. 6,400 forwards over 1,024 ranks take about a second; with ``cores``, and fewer of them than
    ranks, every event is simulated on its own, about 100,000 a second.

    Args:
        work: seconds of every forward on every rank, in place of what the pipeline says of them: a trace is replayed.
    """
    if pipeline.cores is not None and pipeline.cores < pipeline.ranks:
        done, busy, last = _shared_cores(pipeline, pipeline.cores, work)
    else:
        done, busy, last = _own_processors(pipeline, work)
    total = pipeline.steps * pipeline.blocks
    hops = pipeline.ranks - 1
    returned = pipeline.steps * sum(pipeline.result_bytes(block) for block in range(pipeline.blocks))
    return Prediction(
        latency=float(done.max()),
        block_done=done,
        busy=busy,
        last_work=last,
        iterations=pipeline.steps + pipeline.blocks - 1,
        messages=total * pipeline.ranks if hops else 0,
        bytes=total * hops * pipeline.hop_bytes + returned if hops else 0.0,
    )


Times = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _own_processors(p: Pipeline, measured: Sequence[Sequence[float]] | None) -> Times:
    """When blocks are done, how long ranks work, when they finish. Stations are rank 0, link, rank 1, ..., the last
    rank, the link back. A forward leaves station k at ``end[k] = max(end[k-1] + delay[k-1], free[k]) + work[k]``; less
    the work and the delays on the way there this is a running maximum, so that a forward is one call for all ranks."""
    delay = np.zeros(2 * p.ranks)
    if p.ranks > 1:
        delay[1::2] = p.link.latency
    ways: dict[tuple[bool, int, float], tuple[npt.NDArray[np.float64], ...]] = {}
    free, busy, held = np.zeros(2 * p.ranks), np.zeros(p.ranks), np.zeros(p.ranks)
    done = np.zeros(p.blocks)
    back = [0.0]  # when the first so many results are at rank 0
    for forward in forwards(p.steps, p.blocks):
        key = (forward.newest, forward.updates, p.result_bytes(forward.block))
        if key not in ways or measured is not None:  # when the stations begin and end if nothing waits
            own = np.asarray(p.work(forward) if measured is None else measured[forward.number])
            on_link = np.asarray(p.on_links(forward))
            held = on_link * (not p.link.overlap)
            work = np.stack((own + held, on_link - held), 1).ravel()
            ends = np.cumsum(work) + np.concatenate(([0.0], np.cumsum(delay)[:-1]))
            ways[key] = ends - work, ends, own, held
        starts, ends, work, held = ways[key]
        late = free - starts
        late[0] = max(late[0], back[forward.needs])
        free = ends + np.maximum.accumulate(late)
        busy += work
        back.append(float(free[-1] + delay[-1]))
        done[forward.block] = back[-1] + p.update
    busy[0] += p.update
    return done, busy, free[::2] - held


def _shared_cores(p: Pipeline, cores: float, measured: Sequence[Sequence[float]] | None) -> Times:
    """The same with all events on their own: ranks at work advance at the rate min(1, cores / how many there are)."""
    order = list(forwards(p.steps, p.blocks))
    work = [p.work(f) for f in order] if measured is None else measured
    on_link = [p.on_links(f) for f in order]
    turn = [0] * p.ranks  # the forward that a rank works on, or waits for
    arrived = [0] * p.ranks  # forwards that have reached it; results, for rank 0
    occupied = [False] * p.ranks
    link_free = [0.0] * p.ranks
    at_work: list[tuple[float, int]] = []  # (end, rank), in the time that ranks at work feel
    events: list[tuple[float, int, int]] = []  # (seconds, what, rank)
    arrives, let_go = 0, 1
    now = felt = 0.0
    last_update = p.update / min(1.0, cores)
    busy, last, done = np.zeros(p.ranks), np.zeros(p.ranks), np.zeros(p.blocks)

    def begin(rank: int) -> None:
        number = turn[rank]
        if occupied[rank] or number == len(order):
            return
        if arrived[rank] > number if rank else arrived[0] >= order[number].needs:
            occupied[rank] = True
            heapq.heappush(at_work, (felt + work[number][rank], rank))

    def send(rank: int, number: int) -> None:
        """The message leaves behind earlier ones on its link, and arrives."""
        leaves = max(now, link_free[rank]) + on_link[number][rank]
        link_free[rank] = leaves
        to = (rank + 1) % p.ranks
        heapq.heappush(events, (leaves + (p.link.latency if p.ranks > 1 else 0.0), arrives, to))
        if p.link.overlap:
            occupied[rank] = False
        else:
            heapq.heappush(events, (leaves, let_go, rank))

    begin(0)
    while at_work or events:
        rate = min(1.0, cores / len(at_work)) if at_work else 1.0
        end = now + (at_work[0][0] - felt) / rate if at_work else math.inf
        if events and events[0][0] <= end:
            then, what, rank = heapq.heappop(events)
            felt += (then - now) * rate
            now = then
            if what == let_go:
                occupied[rank] = False
            else:
                if rank == 0:
                    done[order[arrived[0]].block] = now + last_update
                arrived[rank] += 1
        else:
            felt, rank = heapq.heappop(at_work)
            now = end
            busy[rank] += work[turn[rank]][rank]
            last[rank] = now
            turn[rank] += 1
            send(rank, turn[rank] - 1)
        begin(rank)
    busy[0] += p.update
    return done, busy, last


def main(argv: Sequence[str] | None = None) -> None:
    from .costs import WAN_1_3B, WAN_14B, Clip, dual_paral, memory_per_rank

    ap = argparse.ArgumentParser(
        prog="python -m vdit_fast.parallel.simulator",
        description="Predicts DualParal's pipeline for a Wan transformer from counted operations and a stated speed.",
    )
    ap.add_argument("--model", choices=("1.3b", "14b"), default="1.3b", help="Wan 2.1 of 30 or of 40 blocks")
    ap.add_argument("--tokens", type=int, default=1560, help="per latent frame: 1560 at 480p, 3600 at 720p")
    ap.add_argument("--frames", type=int, default=1025, help="of the video: 4 k + 1")
    ap.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of processes to compare")
    ap.add_argument("--steps", type=int, default=50, help="denoising steps")
    ap.add_argument("--branches", type=int, default=2, help="guidance branches, in one batch")
    ap.add_argument("--flops", type=float, default=80e12, help="operations per second and rank: an assumption of yours")
    ap.add_argument("--gigabytes-per-second", type=float, default=25.0, help="of a link: 25 PCIe, 400 NVLink")
    ap.add_argument("--latency", type=float, default=1e-5, help="of a link, seconds")
    args = ap.parse_args(argv)
    model = {"1.3b": WAN_1_3B, "14b": WAN_14B}[args.model]
    for name in ("tokens", "frames", "ranks", "steps", "branches", "flops", "gigabytes_per_second"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            ap.error(f"--{name.replace('_', '-')}: {value}; more than 0 is needed")
    if max(args.ranks) > model.layers or args.latency < 0:
        ap.error(f"--ranks {args.ranks}, --latency {args.latency}: at most {model.layers} ranks, and no negative time")
    clip = Clip(args.frames, args.tokens, steps=args.steps, branches=args.branches)
    link = Link(args.gigabytes_per_second * 1e9, args.latency)
    alone = simulate(dual_paral(model, clip, 1, args.flops, link)).latency
    print(f"{clip.blocks} blocks, {clip.steps} steps, {clip.rows} rows and {clip.keys} keys per forward")
    print(f"{'ranks':>5} {'latency':>10} {'first block':>11} {'over one':>8} {'idle':>7} {'sent':>9} {'memory':>9}")
    for ranks in args.ranks:
        run = simulate(dual_paral(model, clip, ranks, args.flops, link))
        most = max(sum(parts.values()) for parts in memory_per_rank(model, clip, ranks))
        print(
            f"{ranks:>5} {run.latency:>8.1f} s {run.first_block:>9.1f} s {alone / run.latency:>7.2f}x"
            f" {run.bubble:>7.1%} {run.bytes / 1e9:>6.0f} GB {most / 1e9:>6.1f} GB"
        )


if __name__ == "__main__":
    main()
