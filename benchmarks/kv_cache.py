"""A layer's K/V cache on a CPU: append, make room, read, beside what published code does in torch, eager and compiled.

    python -m benchmarks.kv_cache --out benchmarks/results/cpu

All contenders run in turn in one process, so that a slow spell of the machine hits all alike; ratios are medians of the
rounds' own ratios, with their minimum and maximum. One thread: its CPU time. Two: the time that passes. A copy of as
many bytes runs in every round of the calls that only move memory. Bytes are what must be moved: every input read once,
every result written once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from benchmarks.cache import counted
from harness import in_turns, parser, write
from torch import Tensor

from vdit_fast import report
from vdit_fast.streaming import KVCache, split_attention

Call = Callable[[], Any]
OWN, TORCH, COMPILED, COPY, WHOLE = "vdit_fast", "torch", "torch.compile", "copy", "vdit_fast, whole"
PAGE, HEADS, DIM, SINKS = 1560, 12, 128, 1  # a latent frame of Wan 1.3B at 480p


@dataclass(frozen=True)
class Case:
    """``kind`` names a function below; capacity and chunk in frames; queries and heads of the few-query reads."""

    kind: str
    capacity: int
    chunk: int = 3
    queries: int = 0
    heads: int = HEADS

    @property
    def name(self) -> str:
        few = f", {self.queries} queries, {self.heads} head{'s' * (self.heads > 1)}" if self.queries else ""
        return f"{self.kind}, {self.capacity} frames{few}"


CASES = [
    Case("append", 21),
    Case("roll", 21),
    Case("rotate", 21),
    Case("decode", 6, chunk=1),  # a whole frame of queries
    Case("decode", 21, chunk=1, queries=16, heads=1),
    Case("decode", 21, chunk=1, queries=16, heads=12),
]
LONG = Case("decode", 21, chunk=1)  # minutes on a CPU
NAMED = {case.name: case for case in (*CASES, LONG)}
SMALL = [Case(c.kind, min(c.capacity, 4), min(c.chunk, 2), c.queries, c.heads) for c in CASES]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels, in fp32; Wan's expression."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(x.dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x.flatten(2), weight.shape, weight, 1e-6).unflatten(2, x.shape[2:])


def append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    keys[:, -k.shape[1] :] = rotate(rms(k, weight), cos, sin)
    values[:, -v.shape[1] :] = v


def shift_left(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, sinks: int) -> None:
    """Behind the sinks everything moves towards the front, then the chunk goes to the end."""
    new = k.shape[1]
    for buffer, chunk in ((keys, k), (values, v)):
        buffer[:, sinks:-new] = buffer[:, sinks + new :].clone()
        buffer[:, -new:] = chunk


def concatenated(q: Tensor, past: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> Tensor:
    keys, values = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(past, (k, v), strict=True))
    return functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)


def _full(case: Case, dtype: torch.dtype, device: str, page: int, store: str = "post_rope") -> KVCache:
    cache = KVCache(
        layers=1, capacity=case.capacity, page=page, batch=1, heads=case.heads, head_dim=DIM, sinks=SINKS,
        store=store, dtype=dtype, device=device,
    )  # fmt: skip
    for _ in range(-(-2 * case.capacity // case.chunk)):  # has wrapped around
        cache.reserve(case.chunk)
        shape = (1, case.chunk * page, case.heads, DIM)
        cache.write(0, *(torch.randn(shape, device=device).to(dtype) for _ in range(2)))
    return cache


def contenders(case: Case, dtype: torch.dtype, device: str = "cpu", page: int = PAGE) -> tuple[int, dict[str, Call]]:
    """Bytes that must be moved, and the calls by name; all return the same numbers but the copy."""
    torch._dynamo.reset()
    cache = _full(case, dtype, device, page, "pre_rope" if case.kind == "rotate" else "post_rope")
    tokens, held = case.chunk * page, case.capacity * page
    k, v = (torch.randn(1, tokens, case.heads, DIM, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(case.heads * DIM, device=device).to(dtype)
    row, table_row = case.heads * DIM * dtype.itemsize, 2 * DIM * 4
    keys, values = cache.keys_values(0)
    norm = {"norm": "rms_across", "k_weight": weight}

    def torches(function: Callable[..., Any], *args: Any) -> dict[str, Call]:
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        return {TORCH: partial(function, *args), COMPILED: partial(compiled, *args)}

    def table(rows: int) -> tuple[Tensor, Tensor]:
        angles = torch.rand(rows, DIM // 2, device=device).repeat_interleave(2, -1) * 6
        return angles.cos(), angles.sin()

    if case.kind in ("append", "roll"):
        own_keys, own_values = keys.clone(), values.clone()
        cos, sin = table(tokens)
        slots = cache.reserve(case.chunk)

        def own() -> list[Tensor]:
            where = slots
            if case.kind == "roll":
                where = cache.reserve(case.chunk)
                cache.write(0, k, v)
            else:
                cache.append(0, k, v, cos, sin, **norm)
            return [x[:, slot * page : (slot + 1) * page] for x in (keys, values) for slot in where]

        frames = [x[:, -tokens:].split(page, 1) for x in (own_keys, own_values)]
        written = [frame for parts in frames for frame in parts]
        calls: dict[str, Call] = torches(shift_left, own_keys, own_values, k, v, SINKS * page)
        moved = 4 * tokens * row
        if case.kind == "append":
            calls = torches(append, own_keys, own_values, k, v, weight, cos[:, None], sin[:, None])
            moved += tokens * table_row
        calls = {name: (lambda call=call: (call(), written)[1]) for name, call in calls.items()}
        return moved, {OWN: own} | calls | _copy(moved, device)
    if case.kind == "rotate":
        cos, sin = table((cache.end + 1) * page)
        places = cache.table_rows().long()
        calls = {OWN: lambda: cache.rotated(0, cos, sin, **norm)}
        calls |= torches(lambda x, w, c, s: rotate(rms(x, w), c, s), keys, weight, cos[places, None], sin[places, None])
        moved = held * (2 * row + table_row)
        return moved, calls | _copy(moved, device)
    cache.write(0, k, v)
    q = torch.randn(1, case.queries or page, case.heads, DIM, device=device).to(dtype)
    before = torch.ones(held, dtype=torch.bool, device=device).index_fill_(0, cache.rows().long(), False)
    calls = {OWN: lambda: cache.attend(0, q)}
    if case.queries:
        calls[WHOLE] = lambda: split_attention(q, keys, values, cache.plan(q.shape[1]), parts=1)
    return 2 * held * row, calls | torches(concatenated, q, (keys[:, before], values[:, before]), k, v)


def _copy(moved: int, device: str) -> dict[str, Call]:
    """Reads half of the bytes and writes the other half."""
    source, to = (torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return {COPY: lambda: to.copy_(source)}


def measure(case: Case, dtype: torch.dtype, threads: int, rounds: int, page: int = PAGE) -> dict[str, Any]:
    torch.set_num_threads(threads)
    moved, calls = contenders(case, dtype, page=page)
    nbytes = {"least": moved} | (counted(calls) if COPY in calls else {})
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = in_turns(calls, rounds, clock)
    own = times[OWN]
    flops = 4 * (case.queries or page) * case.capacity * page * case.heads * DIM if case.kind == "decode" else 0
    row: dict[str, Any] = {
        "case": case.name, "dtype": str(dtype).removeprefix("torch."), "threads": threads, "bytes": nbytes,
        "flop": flops, "seconds": {name: statistics.median(t) for name, t in times.items()},
        "gb_per_second": moved / statistics.median(own) / 1e9, "gflop_per_second": flops / statistics.median(own) / 1e9,
    }  # fmt: skip
    for other in calls:
        if other != OWN:
            ratios = [b / a for a, b in zip(own, times[other], strict=True)]
            row[f"over {other}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def main() -> None:
    ap = parser(__doc__, rounds=9)
    ap.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    ap.add_argument("--small", action="store_true", help="pages of 64 tokens: to try the script")
    args = ap.parse_args()
    torch.manual_seed(0)
    load, results = os.getloadavg()[1], []
    with torch.no_grad():
        for threads in args.threads:
            for case in SMALL if args.small else CASES:
                for dtype in (torch.bfloat16, torch.float32):
                    row = measure(case, dtype, threads, args.rounds, 64 if args.small else PAGE)
                    results.append(row)
                    against = [
                        f"{name.removeprefix('over ')} {report.format_ratio(*value)}"
                        for name, value in row.items()
                        if name.startswith("over ")
                    ]
                    print(
                        f"{case.name:40} {row['dtype']:8} {threads} thread(s): "
                        f"{report.format_seconds(row['seconds'][OWN])}, {row['gb_per_second']:.1f} GB/s, "
                        f"{row['gflop_per_second']:.0f} GFLOP/s; {', '.join(against)}",
                        flush=True,
                    )
    command = f"python -m benchmarks.kv_cache --rounds {args.rounds} --threads {' '.join(map(str, args.threads))}"
    document = {
        "kind": "vdit_fast.kv_cache",
        "rows": results,
        "settings": f"pages of {64 if args.small else PAGE} tokens, {DIM} channels per head, {args.rounds} rounds; "
        "one thread: its CPU time, two: the time that passes",
        "load_average_5_min": load,
        "command": command + (" --small" if args.small else ""),
    }
    write(args.out / "kv_cache.json", document)


if __name__ == "__main__":
    main()
