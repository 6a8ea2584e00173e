"""Temporal attention on a CPU: short_attention beside torch's attention, eager and compiled.

    python benchmarks/short_attention.py --out benchmarks/results/cpu

Two layouts. "frames first": tokens lie as [frames, places, heads, dim], so torch needs transposed copies of q, k and v
and one of the result, which are timed with it, as the models make them. "places first": the copies were made before,
and nobody makes any. All contenders run in turn in one process, so that a slow spell of the machine hits all alike;
ratios are medians of the rounds' own ratios, with their minimum and maximum.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from harness import in_turns, parser, write
from pages import SETTINGS, keep_pages
from torch import Tensor

from vdit_fast import report, short_attention

# frames, places, heads, dim; fewer places than the models have (SVD: 18,432 with both guidance branches)
SHAPES = {
    "SVD 576x1024": (25, 1152, 5, 64),
    "AnimateDiff, D 40": (16, 1024, 8, 40),
    "AnimateDiff, D 80": (16, 512, 8, 80),
    "AnimateDiff, D 160": (16, 128, 8, 160),
    "Latte": (16, 512, 16, 72),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def places_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's attention of [places, frames, heads, dim], as diffusers' processor calls it."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def frames_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of [frames, places, heads, dim], with the copies."""
    out = places_first(*(x.transpose(0, 1).contiguous() for x in (q, k, v)))
    return out.transpose(0, 1).contiguous()


def contenders(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    inputs = torch.randn(3, *shape, device=device).to(dtype).unbind(0)
    views = [x.unsqueeze(0) for x in inputs]
    copies = [x.transpose(0, 1).contiguous() for x in inputs]
    compiled = torch.compile(frames_first, dynamic=False, fullgraph=True)
    compiled_first = torch.compile(places_first, dynamic=False, fullgraph=True)
    return {
        "frames first: short_attention": lambda: short_attention(*views),
        "frames first: torch": lambda: frames_first(*inputs),
        "frames first: torch.compile": lambda: compiled(*inputs),
        "places first: short_attention": lambda: short_attention(*copies),
        "places first: torch": lambda: places_first(*copies),
        "places first: torch.compile": lambda: compiled_first(*copies),
    }


def measure(name: str, dtype: str, rounds: int) -> dict[str, Any]:
    shape = SHAPES[name]
    frames, places, heads, dim = shape
    torch._dynamo.reset()
    calls = contenders(shape, DTYPES[dtype])
    with torch.inference_mode():
        times = in_turns(calls, rounds)
    rows = []
    for contender, seconds in times.items():
        own = times[contender.split(":")[0] + ": short_attention"]
        ratios = [a / b for a, b in zip(seconds, own, strict=True)]
        median = statistics.median(seconds)
        rows.append({
            "name": contender,
            "seconds": median,
            "min": min(seconds),
            "max": max(seconds),
            "gflops": 4.0 * places * heads * frames * frames * dim / median / 1e9,
            "of_short": statistics.median(ratios),
            "of_short_min": min(ratios),
            "of_short_max": max(ratios),
        })  # fmt: skip
    return {"model": name, "shape": "x".join(map(str, shape)), "dtype": dtype, "rows": rows}


def main() -> None:
    args = parser(__doc__, rounds=15).parse_args()
    keep_pages()
    load = os.getloadavg()[1]  # what else the machine is doing
    results = [measure(name, dtype, args.rounds) for name in SHAPES for dtype in DTYPES]
    for result in results:
        print(f"\n{result['model']}: {result['shape']}, {result['dtype']}, {torch.get_num_threads()} threads")
        rows = [
            (
                row["name"],
                report.format_seconds(row["seconds"]),
                f"{row['gflops']:.1f}",
                f"{row['of_short']:.2f} ({row['of_short_min']:.2f}-{row['of_short_max']:.2f})",
            )
            for row in result["rows"]
        ]
        print(report.table(rows, ("", "median", "GFLOP/s", "of short_attention")))
    document = {
        "kind": "vdit_fast.short_attention",
        "settings": {"rounds": args.rounds, "seed": 0, "threads": torch.get_num_threads()},
        "allocator": {name: os.environ.get(name) for name in SETTINGS},
        "load_average_5_min": load,
        "results": results,
        "command": f"python benchmarks/short_attention.py --rounds {args.rounds}",
    }
    write(args.out / "short_attention.json", document)


if __name__ == "__main__":
    main()
