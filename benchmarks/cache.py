"""The feature cache's kernels on a CPU, beside the same expressions in torch, eager and compiled.

    python -m benchmarks.cache --out benchmarks/results/cpu

Ours and one of the others take turns in one process, so that a slow spell of the machine hits both alike; ratios are
medians of the rounds' own ratios, with their minimum and maximum. One thread: its CPU time. Two: the time that passes.
Every tensor is larger than the last-level cache, or larger together. Bytes: what must be moved, what eager's operators
read and write, and what inductor counts for the code it makes; a store's read for ownership counts nowhere.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.traffic import Counter
from harness import in_turns, parser, write
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.compile_fx import inductor_metrics_log

from vdit_fast import ops, report
from vdit_fast.ops import taylor_weights

Call = Callable[[], Any]
OWN, TORCH, COMPILED = "vdit_fast", "torch", "torch.compile"
WEIGHTS = taylor_weights(2, known=2, damping=0.5)


@dataclass(frozen=True)
class Case:
    """One call at one size: ``kind`` names a function below; order of the factors; rows and width."""

    kind: str
    order: int
    rows: int = 4096
    width: int = 5120
    coded: bool = False
    """Whether factors are kept in e4m3, with a scale per row."""

    @property
    def name(self) -> str:
        return f"{self.kind}, order {self.order}" + (", e4m3" if self.coded else "")


CASES = [
    Case("update", 0),
    Case("update", 1),
    Case("update", 2),
    Case("offset", 0),
    Case("add", 0),
    Case("forecast", 1),
    Case("gate_add", 1),
    Case("gate_add in place", 1),
    Case("three modules", 1),
    Case("three modules in place", 1),
    Case("update", 0, coded=True),
    Case("update", 1, coded=True),
    Case("forecast", 1, coded=True),
    Case("gate_add in place", 1, coded=True),
    Case("three modules in place", 1, coded=True),
]
NAMED = {case.name: case for case in CASES}


def update(factors: list[Tensor], output: Tensor) -> list[Tensor]:
    new = [output.float()]
    for old in factors[:-1]:
        new.append((new[-1] - old.float()) / 5.0)
    for factor, value in zip(factors, new, strict=True):
        factor.copy_(value)
    return factors


def offset(factors: list[Tensor], output: Tensor, before: Tensor) -> list[Tensor]:
    factors[0].copy_(output - before)
    return factors


def add(x: Tensor, factors: Tensor) -> Tensor:
    return x + factors[0]


def forecast(factors: Tensor) -> Tensor:
    return sum((w * f.float() for w, f in zip(WEIGHTS, factors, strict=False)), 0.0).to(factors.dtype)


def gate_add(x: Tensor, factors: list[Tensor], gates: list[Tensor | None]) -> Tensor:
    """Wan's residuals: the sum in fp32, rounded after every module."""
    for one, gate in zip(factors, gates, strict=True):
        branch = forecast(one)
        x = x + branch if gate is None else (x.float() + branch * gate).type_as(x)
    return x


def gate_add_in_place(x: Tensor, factors: list[Tensor], gates: list[Tensor | None]) -> Tensor:
    return x.copy_(gate_add(x, factors, gates))


E4M3 = torch.float8_e4m3fn
Held = list[tuple[Tensor, Tensor]]


def encoded(value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the scale that torch users give a row."""
    scales = value.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return (value / scales).to(E4M3), scales


def coded_update(held: Held, output: Tensor) -> Held:
    new = [output.float()]
    for codes, scales in held[:-1]:
        new.append((new[-1] - codes.float() * scales) / 5.0)
    for (codes, scales), value in zip(held, new, strict=True):
        found = encoded(value)
        codes.copy_(found[0])
        scales.copy_(found[1])
    return held


def coded_forecast(held: Held, dtype: torch.dtype) -> Tensor:
    return sum((w * codes.float() * scales for w, (codes, scales) in zip(WEIGHTS, held, strict=False)), 0.0).to(dtype)


def coded_gate_add(x: Tensor, held: list[Held], gates: list[Tensor | None]) -> Tensor:
    new = x
    for one, gate in zip(held, gates, strict=True):
        branch = coded_forecast(one, x.dtype)
        new = new + branch if gate is None else (new.float() + branch * gate).type_as(x)
    return x.copy_(new)


def coded_contenders(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[int, dict[str, Call]]:
    """``contenders`` with factors in e4m3: codes and scales, for torch a tensor of each per factor."""

    def draw() -> Tensor:
        return torch.randn(case.rows, case.width, device=device).to(dtype)

    def hold() -> tuple[Tensor, Tensor]:
        scales = torch.full((case.order + 1, case.rows), 2.0**-7, device=device)
        return (torch.randn(case.order + 1, case.rows, case.width, device=device) * 100).to(E4M3), scales

    def apart(pair: tuple[Tensor, Tensor]) -> Held:
        return [(codes.clone(), scales[..., None].clone()) for codes, scales in zip(*pair, strict=True)]

    torch._dynamo.reset()
    one, factor = case.rows * case.width * dtype.itemsize, case.rows * (case.width + 4)
    if case.kind == "update":
        pair, output = hold(), draw()
        own = [(codes, scales[..., None]) for codes, scales in zip(*pair, strict=True)]

        def own_update() -> Held:
            ops.factor_update(pair[0], output, 5.0, known=case.order + 1, scales=pair[1])
            return own

        compiled = torch.compile(coded_update, fullgraph=True, dynamic=False)
        calls = {OWN: own_update, TORCH: partial(coded_update, apart(pair), output)}
        return one + (2 * case.order + 1) * factor, calls | {COMPILED: partial(compiled, apart(pair), output)}
    if case.kind == "forecast":
        pair = hold()
        compiled = torch.compile(coded_forecast, fullgraph=True, dynamic=False)
        return one + 2 * factor, {
            OWN: partial(ops.forecast, pair[0], weights=WEIGHTS, dtype=dtype, scales=pair[1]),
            TORCH: partial(coded_forecast, apart(pair), dtype),
            COMPILED: partial(compiled, apart(pair), dtype),
        }
    modules = 3 if case.kind.startswith("three") else 1
    pairs, x = [hold() for _ in range(modules)], draw()
    rows = torch.randn(modules, 1, case.width, device=device)
    gates = [None if j == 1 else rows[j] for j in range(modules)]
    codes, scales = ([pair[i][:, None] for pair in pairs] for i in (0, 1))
    own_x = x[None]
    compiled = torch.compile(coded_gate_add, fullgraph=True, dynamic=False)
    held = [apart(pair) for pair in pairs]
    return 2 * one + 2 * modules * factor, {
        OWN: partial(ops.forecast_gate_add, own_x, codes, gates, weights=WEIGHTS, out=own_x, scales=scales),
        TORCH: partial(coded_gate_add, x.clone(), held, gates),
        COMPILED: partial(compiled, x.clone(), held, gates),
    }


def contenders(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[int, dict[str, Call]]:
    """Bytes that must be moved, and the calls by name."""
    if case.coded:
        return coded_contenders(case, dtype, device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, case.rows, case.width, device=device).to(dtype)

    def three(own: Callable[..., Any], function: Callable[..., Any], changed: Tensor, *rest: Any) -> dict[str, Call]:
        """Every contender has its own copy of what the calls may change, and returns it or the result."""
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=False)

        def copy() -> Any:  # a tensor per factor for torch: inductor copies a whole stack to change one of its rows
            return [t.clone() for t in changed] if case.kind in ("update", "offset") else changed.clone()

        runs = {TORCH: (function, copy()), COMPILED: (compiled, copy())}
        return {OWN: partial(own, changed, *rest)} | {n: partial(run, t, *rest) for n, (run, t) in runs.items()}

    one = case.rows * case.width * dtype.itemsize
    in_place = case.kind.endswith("in place")
    if case.kind in ("update", "offset"):
        known = case.order + 1
        rest = (draw(1), draw(1)) if case.kind == "offset" else (draw(1),)

        def own_update(factors: Tensor, output: Tensor, minus: Tensor | None = None) -> list[Tensor]:
            ops.factor_update(factors, output, 5.0, known=known, minus=minus)
            return list(factors)

        function = update if case.kind == "update" else offset
        return (2 * case.order + 1 + len(rest)) * one, three(own_update, function, draw(case.order + 1, 1), *rest)
    if case.kind == "add":
        return 3 * one, three(lambda x, f: ops.forecast_gate_add(x, f, weights=[1.0]), add, draw(1), draw(1, 1))
    if case.kind == "forecast":
        return 3 * one, three(lambda f: ops.forecast(f, weights=WEIGHTS), forecast, draw(2, 1))
    modules = 3 if case.kind.startswith("three") else 1
    rows = torch.randn(modules, 1, case.width, device=device)  # Wan's gates are fp32
    gates = [None if j == 1 else rows[j] for j in range(modules)]

    def own_add(x: Tensor, factors: list[Tensor], gates: list[Tensor | None]) -> Tensor:
        return ops.forecast_gate_add(x, factors, gates, weights=WEIGHTS, out=x if in_place else None)

    function = gate_add_in_place if in_place else gate_add
    held = [draw(2, 1) for _ in range(modules)]
    return (2 + 2 * modules) * one, three(own_add, function, draw(1), held, gates)


def counted(calls: dict[str, Call]) -> dict[str, int]:
    """Bytes read and written by eager's operators, and by the compiled code as inductor counts them."""
    with Counter() as counter:
        counter.on = True
        calls[TORCH]()
    metrics.reset()
    inductor_metrics_log.setLevel(logging.INFO)  # without it inductor does not count
    inductor_metrics_log.propagate = False
    with torch._inductor.config.patch(force_disable_caches=True):
        calls[COMPILED]()
    return {TORCH: counter.bytes, COMPILED: metrics.num_bytes_accessed}


def measure(case: Case, dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    moved, calls = contenders(case, dtype)
    nbytes = {"least": moved} | counted(calls)
    clock = time.thread_time if threads == 1 else time.perf_counter
    # Pairs: eager takes a second or more, in which virtual machines with free page reporting give pages back.
    times: dict[str, list[float]] = {OWN: []}
    ratios: dict[str, list[float]] = {}
    for other in (TORCH, COMPILED):
        pair = in_turns({name: calls[name] for name in (OWN, other)}, rounds, clock)
        times[OWN] += pair[OWN]
        times[other] = pair[other]
        ratios[other] = [theirs / own for own, theirs in zip(pair[OWN], pair[other], strict=True)]
    row: dict[str, Any] = {
        "case": case.name, "dtype": str(dtype).removeprefix("torch."), "threads": threads, "rows": case.rows,
        "width": case.width, "bytes": nbytes, "seconds": {name: statistics.median(t) for name, t in times.items()},
        "gb_per_second": moved / statistics.median(times[OWN]) / 1e9,
    }  # fmt: skip
    for other, found in ratios.items():
        row[f"over {other}"] = [statistics.median(found), min(found), max(found)]
    return row


def main() -> None:
    ap = parser(__doc__, rounds=9)
    ap.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    ap.add_argument("--only", default="", help="run the cases whose name contains this")
    args = ap.parse_args()
    torch.manual_seed(0)
    load, results = os.getloadavg()[1], []
    with torch.no_grad():
        for threads in args.threads:
            for case in [case for case in CASES if args.only in case.name]:
                for dtype in (torch.bfloat16, torch.float32):
                    results.append(row := measure(case, dtype, threads, args.rounds))
                    ratios = [report.format_ratio(*row[f"over {other}"]) for other in (TORCH, COMPILED)]
                    times = [f"{b / row['bytes']['least']:.2f}" for b in list(row["bytes"].values())[1:]]
                    print(
                        f"{case.name:32} {row['dtype']:8} {threads} thread(s): "
                        f"{report.format_seconds(row['seconds'][OWN])}, {row['gb_per_second']:.1f} GB/s; "
                        f"torch {ratios[0]} at {times[0]} x the bytes, compiled {ratios[1]} at {times[1]} x",
                        flush=True,
                    )
    document = {
        "kind": "vdit_fast.cache",
        "rows": results,
        "settings": f"{args.rounds} rounds; one thread: its CPU time, two: the time that passes",
        "load_average_5_min": load,
        "command": f"python -m benchmarks.cache --rounds {args.rounds} --threads {' '.join(map(str, args.threads))}",
    }
    write(args.out / "cache.json", document)


if __name__ == "__main__":
    main()
