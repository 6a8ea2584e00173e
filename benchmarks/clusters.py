"""The clustering operators and block means on a CPU, beside what torch offers for the same, and beside dense attention.

    python benchmarks/clusters.py --out benchmarks/results/cpu

All contenders of a problem run in turn in one process, so that a slow spell of the machine hits all alike. Times are
CPU seconds of the one thread that works, which other programs on the machine disturb least; ratios are medians of the
rounds' own ratios, with their minimum and maximum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import in_turns, parser, write
from torch import Tensor

import vdit_fast
from vdit_fast import ops, reference, report

TOKENS, HEADS = 6144, 2
CLUSTERS = {"queries": 100, "keys": 200}
ITERATIONS = 2
Contenders = dict[str, Callable[[], Any]]


def torch_assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The same labels with torch: a product that is stored, and argmin."""
    c = centroids.to(x.dtype).float()
    return (c.square().sum(-1)[:, :, None] - 2 * torch.matmul(x.transpose(1, 2).float(), c.mT)).argmin(-1)


def torch_sort(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The same order with torch: a stable comparison sort, and scattered counts."""
    counts = torch.zeros(*labels.shape[:-1], classes, dtype=torch.int32)
    counts.scatter_add_(-1, labels.long(), torch.ones_like(labels))
    return labels.argsort(dim=-1, stable=True), counts


def problems(dtype: torch.dtype, dim: int) -> dict[str, Contenders]:
    """Contenders by problem; the first of each is this library's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, HEADS, dim).to(dtype) for _ in range(3))
    start = {
        n: t[:, torch.randperm(TOKENS)[: CLUSTERS[n]]].transpose(1, 2).float() for n, t in (("queries", q), ("keys", k))
    }
    classes = CLUSTERS["keys"]
    labels = ops.kmeans_assign(k, start["keys"])
    order, counts = ops.counting_sort(labels, classes)
    index = order.long().transpose(1, 2)[..., None].expand(-1, -1, -1, dim)
    patches = torch.full((1, 1, TOKENS // 128), 128)

    def both_kmeans() -> None:
        ops.kmeans(q, start["queries"], ITERATIONS)
        ops.kmeans(k, start["keys"], ITERATIONS)

    found: dict[str, Contenders] = {
        "nearest of 200 centroids": {
            "vdit_fast": lambda: ops.kmeans_assign(k, start["keys"]),
            "torch matmul, argmin": lambda: torch_assign(k, start["keys"]),
        },
        "sort by 200 labels": {
            "vdit_fast": lambda: ops.counting_sort(labels, classes),
            "torch argsort, scatter_add": lambda: torch_sort(labels, classes),
        },
        "means of 200 clusters": {
            "vdit_fast": lambda: ops.block_mean(k, counts, order),
            "torch gather, scatter_add": lambda: reference.block_mean(k, counts, order),
        },
        "means of 48 patches of 128": {
            "vdit_fast": lambda: ops.block_mean(k, patches),
            "torch mean": lambda: k.unflatten(1, (-1, 128)).mean(2, dtype=torch.float32),
        },
        "rows in permuted order": {
            "vdit_fast": lambda: ops.permute_tokens(k, order),
            "torch gather": lambda: k.gather(1, index),
        },
        "2 x k-means beside dense attention": {
            "k-means of queries and keys": both_kmeans,
            "dense attention": lambda: vdit_fast.attention(q, k, v),
        },
    }
    return found


def main() -> None:
    args = parser(__doc__, rounds=11).parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)):
        for name, contenders in problems(dtype, dim).items():
            times = in_turns(contenders, args.rounds, time.thread_time, warm=1)
            own, other = times.values()
            ratios = [b / a for a, b in zip(own, other, strict=True)]
            label = f"{str(dtype).removeprefix('torch.')}, dim {dim}"
            results.append({
                "problem": name, "dtype": str(dtype).removeprefix("torch."), "dim": dim, "seconds": times,
                "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            })  # fmt: skip
            middle = [report.format_seconds(statistics.median(t)) for t in (own, other)]
            ratio = report.format_ratio(statistics.median(ratios), min(ratios), max(ratios))
            rows.append((name, label, *middle, list(contenders)[1], ratio))
    print(report.table(rows, ("problem", "", "vdit_fast", "other", "which", "other / vdit_fast")))
    document = {
        "kind": "vdit_fast.clusters_bench",
        "version": 1,
        "settings": {
            "tokens": TOKENS, "heads": HEADS, "clusters": CLUSTERS, "iterations": ITERATIONS, "rounds": args.rounds,
            "threads": 1, "clock": "CPU seconds of the working thread",
        },
        "results": results,
        "command": f"python benchmarks/clusters.py --rounds {args.rounds}",
    }  # fmt: skip
    write(args.out / "clusters.json", document)


if __name__ == "__main__":
    main()
