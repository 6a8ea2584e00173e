"""What cache policies cost in fidelity on the demo model: PSNR against the computed clips, and what was forecast.

    python benchmarks/cache_policies.py --out benchmarks/results/cpu

Small clips of the packaged model; seconds are those of the denoising loop and only tell the order of things.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from harness import write

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import GRANULARITIES, CachePolicy, from_dict
from vdit_fast.config import Config
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.sampler import DemoPipeline

PROMPTS = ("red circle right, blue square up", "green ring left")
SIZE = {"frames": 8, "height": 40, "width": 40}
STEPS, SEED = 12, 1
SCHEDULE = {"first_full": 0.34, "last_full": 1}
ORDERS = ((0, 1.0), (1, 0.5), (1, 1.0), (2, 0.5))


def policies() -> list[dict[str, Any]]:
    """The settings that are compared, in the mapping form."""
    taylor = [
        {"method": "taylorseer", "granularity": g, "interval": n, "order": order, "damping": damping, **SCHEDULE}
        for n in (2, 3)
        for g in GRANULARITIES
        for order, damping in ORDERS
    ]
    adaptive = [
        {"method": method, "threshold": threshold, **SCHEDULE}
        for method in ("first_block", "teacache")
        for threshold in (0.1, 0.2, 0.3)
    ]
    delta = [
        {"method": "delta_dit", "interval": n, "length": length, "last_full": 1}
        for n in (2, 3)
        for length in (0.25, 0.5)
    ]
    return taylor + adaptive + delta


def measured(pipe: DemoPipeline, policy: CachePolicy, dense: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Fidelity and counts of one policy over all prompts."""
    decibels, seconds = [], 0.0
    with accelerate(pipe, Config(cache=policy)) as handle:
        for prompt, clip in dense.items():
            drawn = pipe(prompt, steps=STEPS, seed=SEED, **SIZE)
            error = float((drawn.clip - clip).square().mean())
            decibels.append(-10 * math.log10(error) if error else math.inf)
            seconds += drawn.seconds
        cache = handle.stats()["cache"]
    forecast, full = sum(cache["forecast"].values()), sum(cache["full"].values())
    return {
        "forecast": forecast,
        "forwards": forecast + full,
        "blocks_left_out": cache["blocks_left_out"],
        "blocks": cache["blocks_left_out"] + cache["blocks_run"],
        "psnr": sum(decibels) / len(decibels),
        "worst": min(decibels),
        "nbytes": cache["nbytes"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for cache_policies.json")
    parser.add_argument("--only", help="run the policies whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = DemoPipeline(load_demo_model())
    with accelerate(pipe):
        dense = {prompt: pipe(prompt, steps=STEPS, seed=SEED, **SIZE).clip for prompt in PROMPTS}
    rows = []
    for settings in policies():
        if options.only and options.only not in settings["method"]:
            continue
        rows.append({"policy": settings, **measured(pipe, from_dict(settings), dense)})
        print(rows[-1], flush=True)
    results = {"kind": "cache policies", "prompts": PROMPTS, "steps": STEPS, "seed": SEED, **SIZE, "rows": rows}
    write(options.out / "cache_policies.json", results)


if __name__ == "__main__":
    main()
