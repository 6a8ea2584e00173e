"""The adaptive norms on a CPU, beside the models' own chains of torch operators, eager and compiled.

    python benchmarks/adaln.py --out benchmarks/results/cpu

All contenders run in turn in one process, so that a slow spell of the machine hits all alike; ratios are medians of the
rounds' own ratios, with their minimum and maximum. One thread: its CPU time. Two: the time that passes. The bytes are
what has to be moved: x, y and the results once. Inductor does not round between the operators of a chain: what it
compiles computes as "fast" does. Freed pages stay mapped (pages.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import in_turns, parser, write
from pages import SETTINGS, keep_pages
from torch import Tensor

from vdit_fast import ops, report

# Threads, width, rows; between the smallest and the largest width only the operator that does everything.
CASES = [(1, 5120, 8192), (1, 1536, 8192), (1, 3072, 4096), (2, 5120, 8192), (1, 1920, 8192), (1, 2048, 8192)]
OPERATORS = ("adaln_modulate", "gate_residual", "gate_residual_norm")
Call = Callable[[], Any]


def wan(x: Tensor, y: Tensor, table: Tensor, temb: Tensor, op: str) -> Any:
    """Table + temb in fp32, and everything else up to the last cast."""
    shift, scale, gate = (table + temb.float()).unbind(1)
    if op != "adaln_modulate":
        x = (x.float() + y * gate).type_as(x)
    if op == "gate_residual":
        return x
    h = (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)
    return h if op == "adaln_modulate" else (x, h)


def hunyuan_video(x: Tensor, y: Tensor, table: Tensor, temb: Tensor, op: str) -> Any:
    """Every operator in the dtype of x; no table."""
    shift, scale, gate = temb.unbind(1)
    if op != "adaln_modulate":
        x = x + y * gate
    if op == "gate_residual":
        return x
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return h if op == "adaln_modulate" else (x, h)


def ours(x: Tensor, y: Tensor, table: Tensor | None, temb: Tensor, op: str, rounding: Any) -> Any:
    shift, scale, gate = temb.unbind(1) if table is None else zip(table[0], temb.unbind(1), strict=True)
    if op == "adaln_modulate":
        return ops.adaln_modulate(x, scale, shift, rounding=rounding)
    if op == "gate_residual":
        return ops.gate_residual(x, y, gate, rounding=rounding)
    return ops.gate_residual_norm(x, y, gate, scale, shift, rounding=rounding)


def contenders(
    chain: Callable[..., Any], op: str, width: int, rows: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[int, dict]:
    """Bytes that must be moved, and the calls by name."""
    x, y = (torch.randn(1, rows, width, device=device).to(dtype) for _ in range(2))
    table, temb = torch.randn(1, 3, width, device=device), torch.randn(1, 3, width, device=device).to(dtype)
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    base = table if chain is wan else None
    calls: dict[str, Call] = {
        "fast": lambda: ours(x, y, base, temb, op, "fast"),
        "eager rounding": lambda: ours(x, y, base, temb, op, "eager"),
        "torch": lambda: chain(x, y, table, temb, op),
        "torch.compile": lambda: compiled(x, y, table, temb, op),
    }
    want, got = (r if isinstance(r, tuple) else (r,) for r in (calls["torch"](), calls["eager rounding"]()))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(
            b, a, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1 if a.element_size() == 2 else 1e-4
        )
    reads, writes = (1 if op == "adaln_modulate" else 2), len(want)
    return (reads + writes) * x.nbytes, calls


def measure(threads: int, chain: Callable[..., Any], op: str, width: int, rows: int, dtype: torch.dtype, rounds: int):
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    moved, calls = contenders(chain, op, width, rows, dtype)
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = in_turns(calls, rounds, clock)
    row: dict[str, Any] = {
        "operator": op, "chain": chain.__name__, "dtype": str(dtype).removeprefix("torch."), "threads": threads,
        "width": width, "rows": rows, "bytes": moved,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "gb_per_second": moved / statistics.median(times["fast"]) / 1e9,
    }  # fmt: skip
    for mine in ("fast", "eager rounding"):
        for other in ("torch", "torch.compile"):
            ratios = [b / a for a, b in zip(times[mine], times[other], strict=True)]
            row[f"{mine} over {other}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def main() -> None:
    args = parser(__doc__, rounds=9).parse_args()
    keep_pages()
    torch.manual_seed(0)
    load, results = os.getloadavg()[1], []
    with torch.no_grad():
        for threads, width, rows in CASES:
            for dtype, chain in ((torch.bfloat16, wan), (torch.bfloat16, hunyuan_video), (torch.float32, wan)):
                for op in OPERATORS if (threads, width) in ((1, 1536), (1, 5120)) else OPERATORS[2:]:
                    results.append(row := measure(threads, chain, op, width, rows, dtype, args.rounds))
                    ratios = [
                        report.format_ratio(*row[f"{mine} over {other}"])
                        for mine in ("fast", "eager rounding")
                        for other in ("torch", "torch.compile")
                    ]
                    print(
                        f"{op:18} {chain.__name__:13} {row['dtype']:8} {rows} x {width}, {threads} thread(s): "
                        f"{report.format_seconds(row['seconds']['fast'])}, {row['gb_per_second']:.1f} GB/s; "
                        f"fast {ratios[0]}, {ratios[1]}; eager rounding {ratios[2]}, {ratios[3]}",
                        flush=True,
                    )
    document = {
        "kind": "vdit_fast.adaln",
        "rows": results,
        "settings": f"{args.rounds} rounds; one thread: its CPU time, two: the time that passes",
        "allocator": {name: os.environ.get(name) for name in SETTINGS},
        "load_average_5_min": load,
        "command": f"python benchmarks/adaln.py --rounds {args.rounds}",
    }
    write(args.out / "adaln.json", document)


if __name__ == "__main__":
    main()
