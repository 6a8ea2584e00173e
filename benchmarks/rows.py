"""Times gather_rows and scatter_rows on this machine beside the torch operators that do the same work.

    python benchmarks/rows.py --rounds 15 --out benchmarks/results/cpu

Contenders take turns within a round and change places from round to round, so that a slow spell of the machine hits all
alike. Times are CPU seconds of the one thread that works; ratios are medians of the rounds' own ratios, with their
minimum and maximum.
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

TOKENS, HEADS, DIM, WIDTH = 6144, 8, 64, 512
Contenders = dict[str, Callable[[], Any]]


def run(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contender in every round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for turn in range(rounds):
        names = list(contenders)[:: 1 if turn % 2 else -1]
        for name in names:
            start = time.thread_time()
            contenders[name]()
            times[name].append(time.thread_time() - start)
    return times


def problems(dtype: torch.dtype) -> dict[str, tuple[Contenders, int]]:
    """Contenders by problem, the first of each this library's, and the bytes that must move."""
    torch.manual_seed(0)
    slots = TOKENS // 2
    x = torch.randn(1, TOKENS, WIDTH).to(dtype)
    both = torch.randn(2, TOKENS, WIDTH).to(dtype)
    rows = torch.rand(2, TOKENS).argsort(-1)[:, :slots].sort(-1).values.to(torch.int32)
    wide = rows.long()
    k, v = (torch.randn(1, TOKENS, HEADS, DIM).to(dtype) for _ in range(2))
    new_k, new_v = (torch.randn(1, slots, HEADS, DIM).to(dtype) for _ in range(2))
    y, gate = torch.randn(1, slots, WIDTH).to(dtype), torch.randn(1, 1, WIDTH).to(dtype)
    each = wide[..., None].expand(-1, -1, WIDTH)
    row = WIDTH * x.element_size()

    def copy_both(index: Tensor) -> None:
        k.index_copy_(1, index, new_k)
        v.index_copy_(1, index, new_v)

    return {
        "gather, one list": (
            {
                "vdit_fast": lambda: ops.gather_rows(x, rows[:1]),
                "torch index_select": lambda: x.index_select(1, wide[0]),
            },
            2 * slots * row,
        ),
        "gather, a list per item": (
            {"vdit_fast": lambda: ops.gather_rows(both, rows), "torch gather": lambda: both.gather(1, each)},
            4 * slots * row,
        ),
        "refresh of keys and values": (
            {
                "vdit_fast": lambda: ops.scatter_rows((k, v), (new_k, new_v), rows[:1]),
                "torch index_copy_, twice": lambda: copy_both(wide[0]),
            },
            4 * slots * row,
        ),
        "gated addition": (
            {
                "vdit_fast": lambda: ops.scatter_rows(x, y, rows[:1], gate=gate, add=True),
                "torch mul, index_add_": lambda: x.index_add_(1, wide[0], gate * y),
            },
            3 * slots * row,
        ),
    }


def main() -> None:
    args = parser(__doc__, rounds=15).parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for dtype in (torch.float32, torch.bfloat16):
        name_of = str(dtype).removeprefix("torch.")
        for name, (contenders, moved) in problems(dtype).items():
            times = run(contenders, args.rounds)
            own, other = times.values()
            ratios = [b / a for a, b in zip(own, other, strict=True)]
            results.append({
                "problem": name, "dtype": name_of, "bytes": moved, "seconds": times,
                "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            })  # fmt: skip
            middle = [report.format_seconds(statistics.median(t)) for t in (own, other)]
            speed = f"{moved / statistics.median(own) / 1e9:.1f} GB/s"
            ratio = report.format_ratio(statistics.median(ratios), min(ratios), max(ratios))
            rows.append((name, name_of, middle[0], speed, middle[1], list(contenders)[1], ratio))
    print(report.table(rows, ("problem", "", "vdit_fast", "", "other", "which", "other / vdit_fast")))
    document = {
        "kind": "vdit_fast.rows_bench",
        "version": 1,
        "settings": {
            "tokens": TOKENS, "rows": TOKENS // 2, "width": WIDTH, "rounds": args.rounds, "threads": 1,
            "clock": "CPU seconds of the working thread",
        },
        "results": results,
        "command": f"python benchmarks/rows.py --rounds {args.rounds}",
    }  # fmt: skip
    write(args.out / "rows.json", document)


if __name__ == "__main__":
    main()
