"""The selection operators and the compilation of block maps on a CPU, against their pure-torch twins.

    python benchmarks/selection.py --out benchmarks/results/cpu

CPU time of one thread, so that other work on the machine does not count. Operator and twin run in turn; ratios are
medians of the rounds' own ratios, with their minimum and maximum. Results are compared first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import parser, write
from torch import Tensor

from vdit_fast import ops, report
from vdit_fast.plan.runs import compile_blocks_reference
from vdit_fast.reference import select as reference

BLOCK, DENSITY = 128, 0.25
ROWS = [(40 * 48, 48), (12 * 180, 180), (4 * 630, 630), (1200, 1000), (4, 630 * 630), (1, 990 * 990)]
MAPS = [(heads, blocks) for blocks in (48, 180, 630) for heads in (2, 12, 40)]
HEADINGS = ("", "median", "torch twin", "speed-up")


def cases() -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Names, operators and twins, with inputs of their own."""
    found: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = []
    for rows, n in ROWS:
        scores = 3 * torch.randn(rows, n)
        mass, k = scores.softmax(-1), max(1, n // 4)
        found.append((
            f"select_top_k {rows} x {n}, k = n / 4",
            lambda x=scores, k=k: ops.select_top_k(x, k),
            lambda x=scores, k=k: reference.select_top_k(x, k),
        ))  # fmt: skip
        found.append((
            f"select_top_p {rows} x {n}, p = 0.9",
            lambda x=mass: ops.select_top_p(x, 0.9),
            lambda x=mass: reference.select_top_p(x, 0.9),
        ))  # fmt: skip
    for heads, blocks in MAPS:
        keep = torch.rand(heads, blocks, blocks) < DENSITY
        lengths, rows = torch.full((1, blocks), BLOCK), blocks * BLOCK
        found.append((
            f"compile_blocks {heads} x {blocks} x {blocks}, density {DENSITY}",
            lambda keep=keep, n=lengths, lq=rows: ops.compile_blocks(keep, n, n, lq),
            lambda keep=keep, n=lengths, lq=rows: compile_blocks_reference(keep, n, n, lq=lq),
        ))  # fmt: skip
    return found


def seconds(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else all(map(torch.equal, a, b))


def main() -> None:
    args = parser(__doc__, rounds=9).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name, operator, twin in cases():
        assert same(operator(), twin()), f"{name}: the results differ"
        times = [(seconds(operator), seconds(twin)) for _ in range(args.rounds)]
        ratios = [b / a for a, b in times]
        rows.append({
            "name": name,
            "seconds": statistics.median(a for a, _ in times),
            "twin_seconds": statistics.median(b for _, b in times),
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
        })  # fmt: skip
    table = [
        (
            row["name"],
            report.format_seconds(row["seconds"]),
            report.format_seconds(row["twin_seconds"]),
            report.format_ratio(row["speedup"], row["speedup_min"], row["speedup_max"]),
        )
        for row in rows
    ]
    print(report.table(table, HEADINGS))
    document = {
        "rows": rows,
        "settings": f"{args.rounds} rounds, CPU time of one thread",
        "command": f"python benchmarks/selection.py --rounds {args.rounds}",
    }
    write(args.out / "select.json", document)


if __name__ == "__main__":
    main()
