"""The search passes over scores on a CPU: score_lse, block_mass, softmax_mass, our dense attention and plain torch.

    python benchmarks/block_mass.py --out benchmarks/results/cpu

All contenders run in turn in one process, so that a slow spell of the machine hits all alike; ratios are medians of the
rounds' own ratios, with their minimum and maximum.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import in_turns, parser, write
from torch import Tensor

import vdit_fast
from vdit_fast import report
from vdit_fast.ops import block_mass, score_lse, softmax_mass

SHAPES = ((1, 2, 6144, 64), (1, 1, 4096, 128))  # batch, heads, tokens, head dim
FOLD = 8
DENSE = "dense attention"


def torch_mass(q: Tensor, k: Tensor, lse: Tensor, block: int) -> Tensor:
    """Weights in memory, then their block sums; for lengths that are multiples of the block."""
    scores = q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)
    weights = scores.mul_(q.shape[-1] ** -0.5).sub_(lse[..., None]).exp_()
    return weights.unflatten(3, (-1, block)).sum(-1).unflatten(2, (-1, block)).sum(3)


def contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By name: FLOP of the products, and the call."""
    batch, tokens, heads, dim = q.shape
    product = 2.0 * batch * heads * tokens * tokens * dim
    lse, folded = score_lse(q, k), score_lse(q, k, fold=FOLD)
    return {
        DENSE: (2 * product, lambda: vdit_fast.attention(q, k, v)),
        "score_lse": (product, lambda: score_lse(q, k)),
        "block_mass 64": (product, lambda: block_mass(q, k, lse, 64, 64)),
        "block_mass 128": (product, lambda: block_mass(q, k, lse, 128, 128)),
        "softmax_mass 128": (product, lambda: softmax_mass(q, k, 128, 128)),
        "torch, 128": (product, lambda: torch_mass(q, k, lse, 128)),
        f"score_lse, fold {FOLD}": (product / FOLD, lambda: score_lse(q, k, fold=FOLD)),
        f"block_mass 128, fold {FOLD}": (
            product / FOLD,
            lambda: block_mass(q, k, folded, 128 // FOLD, 128 // FOLD, fold=FOLD),
        ),
        f"softmax_mass 128, fold {FOLD}": (
            product / FOLD,
            lambda: softmax_mass(q, k, 128 // FOLD, 128 // FOLD, fold=FOLD),
        ),
    }


def measure(shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    batch, heads, tokens, dim = shape
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, tokens, heads, dim).unbind(0)
    calls = contenders(q, k, v)
    times = in_turns({name: call for name, (_, call) in calls.items()}, rounds, warm=1)
    rows = []
    for name, (flop, _) in calls.items():
        ratios = [a / b for a, b in zip(times[name], times[DENSE], strict=True)]
        seconds = statistics.median(times[name])
        rows.append({
            "name": name,
            "seconds": seconds,
            "min": min(times[name]),
            "max": max(times[name]),
            "gflops": flop / seconds / 1e9,
            "of_dense": statistics.median(ratios),
            "of_dense_min": min(ratios),
            "of_dense_max": max(ratios),
        })  # fmt: skip
    return {"shape": "x".join(map(str, shape)), "rows": rows}


def main() -> None:
    args = parser(__doc__, rounds=15).parse_args()
    load = os.getloadavg()[1]  # what else the machine is doing
    results = [measure(shape, args.rounds) for shape in SHAPES]
    for result in results:
        print(f"\nbatch x heads x tokens x dim = {result['shape']}, fp32, {torch.get_num_threads()} threads")
        rows = [
            (
                row["name"],
                report.format_seconds(row["seconds"]),
                f"{row['gflops']:.0f}",
                f"{row['of_dense']:.3f} ({row['of_dense_min']:.3f}-{row['of_dense_max']:.3f})",
            )
            for row in result["rows"]
        ]
        print(report.table(rows, ("", "median", "GFLOP/s", "of dense attention")))
    document = {
        "kind": "vdit_fast.block_mass",
        "settings": {"dtype": "float32", "rounds": args.rounds, "seed": 0, "threads": torch.get_num_threads()},
        "load_average_5_min": load,
        "results": results,
        "command": f"python benchmarks/block_mass.py --rounds {args.rounds}",
    }
    write(args.out / "block_mass.json", document)


if __name__ == "__main__":
    main()
