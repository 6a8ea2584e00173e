"""Why SVG2 is not the best on the demo model: variants of it, and its rivals, on one prompt at one density.

    python examples/demo_model/variants.py --out benchmarks/results/cpu

On recorded attention calls of a dense run: density, the mass that the plans read, and the relative error of the
attention output, per head and call. The variants named by --clips also draw the clip; PSNR is against the dense clip of
the same kernel.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdit_fast
from vdit_fast import report
from vdit_fast.cli.methods_bench import Settings, _Bench
from vdit_fast.cli.recording import Call
from vdit_fast.planners import Planner, from_dict

SVG2 = {"method": "svg2"}
VARIANTS: dict[str, dict[str, Any]] = {
    "svg2, top_p 0.66": {**SVG2, "top_p": 0.663},
    "svg2, top_p 0.6, min_keep_ratio 0.2": {**SVG2, "top_p": 0.6, "min_keep_ratio": 0.2},
    "svg2, sparsity 0.7": {**SVG2, "sparsity": 0.7},
    "svg2, sparsity 0.7, 4x clusters": {**SVG2, "sparsity": 0.7, "q_clusters": 312, "k_clusters": 1256},
    "svg2, sparsity 0.7, 10 + 50 iterations": {**SVG2, "sparsity": 0.7, "first_iterations": 50, "iterations": 10},
    "svg2, sparsity 0.7, compensate": {**SVG2, "sparsity": 0.7, "compensate": True},
    "xattention, top_p 0.69": {"method": "xattention", "top_p": 0.694, "block": 64},
    "sparge, top_p": {"method": "sparge", "top_p": 0.55},
    "sparge, sparsity 0.7": {"method": "sparge", "sparsity": 0.7},
    "draft, sparsity 0.7": {"method": "draft", "sparsity": 0.7, "pool": [4, 8]},
    "svg1, sparsity 0.74": {"method": "svg1", "sparsity": 0.74, "block": 64, "sinks": 1},
}


def errors(planner: Planner, calls: list[Call], wanted: list[Tensor]) -> dict[str, list[float]]:
    """Per recorded call and head: density, mass read by the sampled queries, relative L2 error of the output."""
    state: dict[Any, Any] = {}
    density, mass, error = [], [], []
    for call, want in zip(calls, wanted, strict=True):
        plan = planner.decision(call.q, call.k, call.v, replace(call.ctx, state=state)).plan
        if plan is None:
            continue
        got = vdit_fast.attention(call.q, call.k, call.v, plan)
        density += plan.density_per_head.float().mean(0).expand(call.q.shape[2]).tolist()
        error += ((got - want).square().sum((0, 1, 3)) / want.square().sum((0, 1, 3))).sqrt().tolist()
        mass += [weights.kept(plan)[1] for weights in call.weights]
    return {"density": density, "mass": mass, "error": error}


def row(name: str, settings: Settings, calls: list[Call], wanted: list[Tensor]) -> dict[str, Any]:
    planner = made(name, settings)
    heads = errors(planner, calls, wanted)
    found: dict[str, Any] = {"variant": name, "config": planner.to_dict(), "heads": heads}
    for key, values in heads.items():
        found[key], found[f"{key}_min"], found[f"{key}_max"] = statistics.fmean(values), min(values), max(values)
    numbers = (f"{key} {found[key]:.3f} ({found[f'{key}_min']:.3f}-{found[f'{key}_max']:.3f})" for key in heads)
    print(f"{name:40}", "  ".join(numbers), flush=True)
    return found


def made(name: str, settings: Settings) -> Planner:
    return from_dict({"dense_steps": settings.dense_steps, **VARIANTS[name]})


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--prompt", default="red circle right, blue square up")
    ap.add_argument("--steps", type=int, default=12)
    ap.add_argument(
        "--clips", action="append", default=[], choices=list(VARIANTS), help="draw this variant's clip, too; repeatable"
    )
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args = ap.parse_args()
    settings = Settings(prompts=(args.prompt,), steps=args.steps, dense_steps=max(1, args.steps // 4))
    bench = _Bench(settings, None, None)
    with torch.no_grad():
        calls = bench.record()
        wanted = [vdit_fast.attention(call.q, call.k, call.v) for call in calls]
        rows = [row(name, settings, calls, wanted) for name in VARIANTS]
        dense = bench.draw_with(None, args.prompt)[0].clip if args.clips else None
        for found in rows:
            if dense is not None and found["variant"] in args.clips:
                drawn, _ = bench.draw_with(made(found["variant"], settings), args.prompt)
                found["psnr"] = float(report.compare_clips(drawn.clip, dense).to_dict()["psnr"])
                print(f"{found['variant']:40} PSNR {found['psnr']:.1f} dB", flush=True)
    document = {
        "kind": "vdit_fast.svg2_variants",
        "settings": vars(settings) | bench.facts(),
        "rows": rows,
        "command": f"python examples/demo_model/variants.py --steps {args.steps}"
        + "".join(f" --clips '{name}'" for name in args.clips),
        "environment": report.environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    print("written:", report.write_json(args.out / "svg2_variants.json", report.json_safe(document)))


if __name__ == "__main__":
    main()
