"""What planning costs on a CPU: every planner at 8,192 tokens, in percent of dense attention of the same call.

    python benchmarks/planners.py --out benchmarks/results/cpu

CPU time of one thread, so that other work on the machine counts little; planner and dense attention run in turn, ratios
are medians of the rounds' own ratios. Queries and keys are smooth waves plus noise, other noise at every step. Planners
have their own defaults but for what a method needs to be sparse here; "first" is the first sparse or searching call of
a generation, "later" the ones after it. What a method computes after the attention (its ``observe``) counts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from harness import parser, write
from torch import Tensor

import vdit_fast
from vdit_fast import report
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import REGISTRY, Planner, from_dict

GRID = (8, 32, 32)
SHAPES = ((2, 64), (2, 128))  # heads, head dim
STEPS = 50
KNOBS: dict[str, dict[str, Any]] = {
    "adaspa": {"search": [0, 2]},
    "rettention": {"interval": 3},
    "sparse_vdit": {"modes": "dm"},
    "svg2": {"sparsity": 0.7},
}
HEADINGS = ("planner", "heads x dim", "density", "first call", "later calls")


def inputs(heads: int, dim: int, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v [1, N, heads, dim] per step: the same waves, other noise."""
    axes = [torch.arange(n, dtype=torch.float32) / 8 for n in GRID]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    wave = torch.cos(torch.einsum("na,had->nhd", place, 2 * torch.randn(heads, 3, dim)) + 6 * torch.rand(heads, dim))
    noisy = ((wave + 0.3 * torch.randn(wave.shape))[None] for _ in range(3 * steps))
    return [(2 * next(noisy), 2 * next(noisy), next(noisy)) for _ in range(steps)]


def context(step: int, state: dict[Any, Any]) -> LayerContext:
    n_video = GRID[0] * GRID[1] * GRID[2]
    place = StepContext(step=step, num_steps=STEPS, sigma=1 - step / STEPS)
    return LayerContext(0, 1, "attn", GRID, n_video, step=place, state=state)


def planning(
    planner: Planner, step: int, tensors: tuple[Tensor, Tensor, Tensor], state: dict[Any, Any]
) -> tuple[float, float | None]:
    """Seconds of the decision and of what follows the attention; the plan's density, None for a dense call."""
    q, k, v = tensors
    start = time.thread_time()
    found = planner.decision(q, k, v, context(step, state))
    seconds = time.thread_time() - start
    if found.observe is not None:
        out, lse = vdit_fast.attention(q, k, v, found.plan, row_scale=found.row_scale, return_lse=True)
        start = time.thread_time()
        found.observe(out, lse)
        seconds += time.thread_time() - start
    return seconds, None if found.plan is None else found.plan.density


def measure(name: str, heads: int, dim: int, rounds: int) -> dict[str, Any]:
    planner = from_dict({"method": name, "dense_steps": 0, **KNOBS.get(name, {})})
    first, later, density = [], [], []
    for _ in range(rounds):
        state: dict[Any, Any] = {}
        for step, tensors in enumerate(inputs(heads, dim, 4)):
            start = time.thread_time()
            vdit_fast.attention(*tensors)
            dense = time.thread_time() - start
            seconds, read = planning(planner, step, tensors, state)
            (later if step else first).append(seconds / dense)
            density += [] if read is None else [read]
    return {
        "planner": name,
        "knobs": planner.to_dict(),
        "shape": f"{heads} x {dim}",
        "density": statistics.mean(density),
        **{
            f"{when}_{how}": f(series) for when, series in (("first", first), ("later", later)) for how, f in STATISTICS
        },
    }


STATISTICS = (("median", statistics.median), ("min", min), ("max", max))


def main() -> None:
    ap = parser(__doc__, rounds=3)
    ap.add_argument("--planner", action="append", help="only this one (repeatable)")
    args = ap.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = args.planner or sorted(REGISTRY)
    with torch.no_grad():
        rows = [measure(name, *shape, args.rounds) for name in names for shape in SHAPES]

    def share(row: dict[str, Any], when: str) -> str:
        low, middle, high = (100 * row[f"{when}_{how}"] for how in ("min", "median", "max"))
        return f"{middle:.1f}% ({low:.1f}-{high:.1f})"

    table = [
        (r["planner"], r["shape"], report.format_percent(r["density"]), share(r, "first"), share(r, "later"))
        for r in rows
    ]
    print(report.table(table, HEADINGS))
    document = {
        "tokens": GRID[0] * GRID[1] * GRID[2],
        "grid": list(GRID),
        "rows": rows,
        "settings": f"fp32, {args.rounds} rounds of 4 steps, CPU time of one thread, shares of dense attention",
        "command": f"python benchmarks/planners.py --rounds {args.rounds}",
    }
    write(args.out / "planners.json", document)


if __name__ == "__main__":
    main()
