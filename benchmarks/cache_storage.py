"""What the dtype of a cache's factors costs in fidelity on the demo model: PSNR against the computed clips, and bytes.

    python -m benchmarks.cache_storage --out benchmarks/results/cpu

The clips and the schedule of ``benchmarks/cache_policies.py``; only the storage differs within a group of rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.cache_policies import PROMPTS, SCHEDULE, SEED, SIZE, STEPS, measured
from harness import write

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import from_dict
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.sampler import DemoPipeline

STORAGES = ("fp32", "bf16", "float8_e4m3fn")
ORDERS = ((0, 1.0), (1, 0.5), (2, 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for cache_storage.json")
    parser.add_argument("--granularities", nargs="+", default=["model", "span", "module"])
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = DemoPipeline(load_demo_model())
    with accelerate(pipe):
        dense = {prompt: pipe(prompt, steps=STEPS, seed=SEED, **SIZE).clip for prompt in PROMPTS}
    rows = []
    for interval in options.intervals:
        for granularity in options.granularities:
            for order, damping in ORDERS:
                for storage in STORAGES:
                    settings = {
                        "method": "taylorseer", "granularity": granularity, "interval": interval, "order": order,
                        "damping": damping, "storage": storage, **SCHEDULE,
                    }  # fmt: skip
                    rows.append({"policy": settings, **measured(pipe, from_dict(settings), dense)})
                    found = rows[-1]
                    print(
                        f"{granularity:7} interval {interval} order {order} {storage:14} {found['psnr']:.2f} dB, worst "
                        f"{found['worst']:.2f}, {found['nbytes']:,} bytes",
                        flush=True,
                    )
    results = {
        "kind": "cache storage", "prompts": PROMPTS, "steps": STEPS, "seed": SEED, **SIZE, "rows": rows,
        "command": f"python -m benchmarks.cache_storage --intervals {' '.join(map(str, options.intervals))}",
    }  # fmt: skip
    write(options.out / "cache_storage.json", results)


if __name__ == "__main__":
    main()
