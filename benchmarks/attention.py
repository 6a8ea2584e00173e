"""The attention benchmark with its peers: torch SDPA, masked SDPA and compiled FlexAttention on the same blocks.

    python benchmarks/attention.py --out benchmarks/results/cpu     (also: make bench)

All contenders run in turn in one process, so that a slow spell of the machine hits all alike; the ratios are medians
of the rounds' own ratios, with their minimum and maximum.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vdit_fast import AttentionPlan, attention, report
from vdit_fast.cli.bench import DENSITIES, Shape, random_block_mask

SUITES = {
    "cpu": [Shape(1, 2, 6144, 64), Shape(1, 1, 4096, 128), Shape(1, 2, 6144, 128)],
    "quick": [Shape(1, 2, 2048, 64)],
}
BLOCK = 128  # FlexAttention's smallest block on a CPU, and the tile of most published sparse methods


def contenders(shape: Shape, with_flex: bool) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Name -> (density executed, call). All read the same tensors and, per density, the same blocks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape.batch, shape.length, shape.heads, shape.dim, generator=generator) for _ in range(3))
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "torch SDPA": (1.0, lambda: scaled_dot_product_attention(*heads_first)),
        "vdit_fast dense": (1.0, lambda: attention(q, k, v)),
    }
    for density in DENSITIES[1:]:
        mask = random_block_mask(shape, density, BLOCK, generator)
        plan = AttentionPlan.from_block_mask(mask, BLOCK, BLOCK, lq=shape.length, lk=shape.length)
        calls[f"vdit_fast {density:g}"] = plan.density, lambda plan=plan: attention(q, k, v, plan)
        if density != 0.25:
            continue
        full = plan.to_mask()
        calls["torch SDPA, mask 0.25"] = (
            1.0,
            lambda full=full: scaled_dot_product_attention(*heads_first, attn_mask=full),
        )
        if with_flex:
            calls["FlexAttention compiled 0.25"] = plan.density, flex(heads_first, mask)
    return calls


def flex(tensors: list[torch.Tensor], mask: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = tensors[0].shape[2]

    def mask_mod(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return mask[h, i // BLOCK, j // BLOCK]

    blocks = create_block_mask(mask_mod, 1, mask.shape[0], length, length, device="cpu", BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*tensors, block_mask=blocks)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@torch.no_grad()
def measure(shape: Shape, rounds: int, with_flex: bool) -> dict[str, Any]:
    calls = contenders(shape, with_flex)
    want = calls["torch SDPA"][1]().transpose(1, 2)
    error = float((calls["vdit_fast dense"][1]() - want).abs().max())
    if "FlexAttention compiled 0.25" in calls:
        other = calls["FlexAttention compiled 0.25"][1]().transpose(1, 2)
        error = max(error, float((calls["vdit_fast 0.25"][1]() - other).abs().max()))
    if error > 1e-4:
        raise SystemExit(f"{shape}: the contenders disagree by {error}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False, *[True] * rounds]:
        for name, (_, call) in calls.items():
            start = time.perf_counter()
            call()
            if counted:
                times[name].append(time.perf_counter() - start)
    rows = {}
    for name, (density, _) in calls.items():
        seconds = statistics.median(times[name])
        rows[name] = {
            "density": density,
            "seconds": spread(times[name]),
            "effective_gflops": shape.flop / seconds / 1e9,
            "executed_gflops": shape.flop * density / seconds / 1e9,
            "speedup_over_sdpa": spread([a / b for a, b in zip(times["torch SDPA"], times[name], strict=True)]),
            "speedup_over_own_dense": spread(
                [a / b for a, b in zip(times["vdit_fast dense"], times[name], strict=True)]
            ),
        }
    return {"shape": str(shape), "max_difference": error, "rows": rows}


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    ap.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for a minute")
    args = ap.parse_args()
    results = []
    for shape in SUITES[args.suite]:
        result = measure(shape, args.rounds, not args.no_flex)
        results.append(result)
        print(
            f"\nbatch x heads x tokens x dim = {shape}, fp32, {torch.get_num_threads()} threads, {args.rounds} rounds"
        )
        rows = [
            [
                name,
                report.format_percent(row["density"]),
                report.format_seconds(row["seconds"]["median"]),
                f"{row['effective_gflops']:.0f}",
                f"{row['executed_gflops']:.0f}",
                report.format_ratio(*(row["speedup_over_sdpa"][k] for k in ("median", "min", "max"))),
                report.format_ratio(*(row["speedup_over_own_dense"][k] for k in ("median", "min", "max"))),
            ]
            for name, row in result["rows"].items()
        ]
        print(
            report.table(rows, ["", "density", "time", "GFLOP/s eff.", "executed", "over torch SDPA", "over own dense"])
        )
    args.out.mkdir(parents=True, exist_ok=True)
    document = {
        "command": f"python benchmarks/attention.py --suite {args.suite} --rounds {args.rounds}",
        "environment": report.environment(),
        "results": results,
    }
    print("\nwritten:", report.write_json(args.out / "attention.json", document))
    curves = {
        result["shape"]: {
            key: [f(row) for name, row in result["rows"].items() if name.startswith("vdit_fast")]
            for key, f in (
                ("density", lambda row: row["density"]),
                ("speedup", lambda row: row["speedup_over_own_dense"]["median"]),
                ("low", lambda row: row["speedup_over_own_dense"]["min"]),
                ("high", lambda row: row["speedup_over_own_dense"]["max"]),
            )
        }
        for result in results
    }
    print("written:", report.speed_curve(curves, args.out / "attention_speed.png", title="block-sparse attention, CPU"))


if __name__ == "__main__":
    main()
