"""Draws a clip of the demo model densely and with region-adaptive sampling: CPU seconds, and what it costs in quality.

    python benchmarks/subset.py --rounds 1 --out benchmarks/results/cpu

Contenders take turns within a round. Seconds are CPU seconds of the one thread that works; ratios are medians of the
rounds' own ratios. The clip is compared with that of the first contender, which computes all tokens at every step.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from harness import parser, write

from vdit_fast import report
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.sampler import DemoPipeline, Sample
from vdit_fast.subset import RAS

PROMPT, STEPS = "red circle right, blue square up", 12
EARLY = {"start": 4, "reset": (8,)}
CONTENDERS: dict[str, Config] = {
    "all tokens": Config(),
    "half, smallest left out": Config(subset=RAS(**EARLY, high_ratio=0)),
    "half, largest left out": Config(subset=RAS(**EARLY, high_ratio=1)),
    "a quarter, smallest left out": Config(subset=RAS(**EARLY, sample_ratio=0.25, high_ratio=0)),
}


def draw(pipe: DemoPipeline, config: Config) -> tuple[Sample, float, dict[str, Any]]:
    """The clip, the thread's CPU seconds, and what the handle counted."""
    with accelerate(pipe, config) as handle:
        start = time.thread_time()
        sample = pipe(PROMPT, steps=STEPS, seed=0)
        return sample, time.thread_time() - start, handle.stats()["subset"] or {}


def main() -> None:
    args = parser(__doc__, rounds=1).parse_args()
    torch.set_num_threads(1)
    pipe = DemoPipeline(load_demo_model())
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    clips, counted = {}, {}
    for _ in range(args.rounds):
        for name, config in CONTENDERS.items():
            sample, spent, counted[name] = draw(pipe, config)
            clips[name] = sample.clip
            seconds[name].append(spent)
    first = next(iter(CONTENDERS))
    results, rows = [], []
    for name, config in CONTENDERS.items():
        quality = report.compare_clips(clips[name], clips[first]).to_dict()
        ratios = [b / a for a, b in zip(seconds[name], seconds[first], strict=True)]
        left = counted[name].get("left", 0) / max(1, counted[name].get("left", 0) + counted[name].get("computed", 0))
        results.append({
            "name": name, "config": config.to_dict(), "seconds": seconds[name], "speedup": ratios, "rows_left": left,
            "quality": quality,
        })  # fmt: skip
        middle = statistics.median(seconds[name]), statistics.median(ratios)
        numbers = [f"{float(quality[key]):.4g}" for key in ("psnr", "ssim", "flicker_psnr") if key in quality]
        rows.append((name, f"{middle[0]:.1f} s", f"{middle[1]:.2f}x", f"{left:.1%}", *numbers))
    names = [key for key in ("psnr", "ssim", "flicker_psnr") if key in results[0]["quality"]]
    print(report.table(rows, ("", "CPU time", "speed-up", "rows left out", *names)))
    document = {
        "kind": "vdit_fast.subset_bench",
        "version": 1,
        "settings": {"prompt": PROMPT, "steps": STEPS, "seed": 0, "threads": 1, "rounds": args.rounds},
        "results": results,
        "command": f"python benchmarks/subset.py --rounds {args.rounds}",
    }
    write(args.out / "subset.json", document)


if __name__ == "__main__":
    main()
