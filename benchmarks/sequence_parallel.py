"""Sequence parallelism over gloo on one machine: seconds and bytes of the exchange beside those of the rest.

    python benchmarks/sequence_parallel.py --ranks 2 --steps 4 --out benchmarks/results/cpu

One forward of the demo model per step, dense and over two sparse plans, alone (on every rank at once, so that cores are
as busy) and together. Every rank has one thread. Gloo copies through loopback sockets: the seconds of the exchange say
nothing about a network between GPUs, its bytes do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from harness import write

CONFIGS: dict[str, Any] = {
    "dense": "exact",
    "draft": {"attention": {"method": "draft", "pool": [4, 4], "sparsity": 0.75, "dense_steps": 0}},
    "svg2": {"attention": {"method": "svg2", "dense_steps": 0}},
}


@contextmanager
def timed_exchanges(seconds: list[float]) -> Iterator[None]:
    """Add up what collective calls take, waiting for other ranks included."""
    from vdit_fast.parallel import collectives

    stock = collectives._exchange, collectives._gathered

    def timed(fn: Any) -> Any:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            found = fn(*args)
            seconds[0] += time.perf_counter() - begin
            return found

        return call

    collectives._exchange, collectives._gathered = map(timed, stock)
    try:
        yield
    finally:
        collectives._exchange, collectives._gathered = stock


def formula(rank: int, ranks: int, rows: int, heads: int, width: int, layers: int, itemsize: int) -> int:
    """Bytes a rank sends in one forward: of q, k, v and the result, and of the joined rows."""
    from vdit_fast.models.row_shard import equal_rows
    from vdit_fast.parallel.ulysses import HeadSplit

    sizes, split = equal_rows(rows, ranks), HeadSplit(heads, heads, ranks)  # some heads twice where ranks are more
    away = 3 * sizes[rank] * (sum(split.counts) - split.counts[rank]) + (rows - sizes[rank]) * split.kept[rank]
    return itemsize * (layers * away * width + (ranks - 1) * sizes[rank] * heads * width)


def measure(rank: int, ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from vdit_fast import accelerate
    from vdit_fast.demo.model import load_demo_model
    from vdit_fast.parallel import sequence_parallel

    model = load_demo_model()
    config = model.config
    latents = torch.randn(1, 3, options.frames, 64, 64, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 16, config.text_dim, generator=torch.Generator().manual_seed(1))
    rows = options.frames * 16 * 16

    def forwards() -> tuple[torch.Tensor, list[float]]:
        seconds, out = [], latents
        with torch.no_grad():
            for step in range(options.steps):
                dist.barrier()
                begin = time.perf_counter()
                out = model(latents, torch.tensor([1000.0 - 100 * step]), text, return_dict=False)[0]
                seconds.append(time.perf_counter() - begin)
        return out, seconds

    found = []
    for name, settings in CONFIGS.items():
        with accelerate(model, settings) as handle:
            forwards()
            handle.reset()
            want, alone = forwards()
            exchange = [0.0]
            with sequence_parallel(handle), timed_exchanges(exchange):
                forwards()
                handle.reset()
                handle.roots[0].session.around_heads["sequence"].bytes_sent = 0  # type: ignore[attr-defined]
                handle.roots[0].session.around["sequence"].bytes_sent = 0  # type: ignore[attr-defined]
                exchange[0] = 0.0
                got, together = forwards()
                sent = handle.stats()["parallel"]["sequence"]["bytes"]
        expected = options.steps * formula(
            rank, ranks, rows, config.num_attention_heads, config.attention_head_dim, config.num_layers, 4
        )
        found.append(
            {
                "config": name,
                "rank": rank,
                "rows": rows,
                "seconds_per_forward_alone": statistics.median(alone),
                "seconds_per_forward": statistics.median(together),
                "exchange_seconds_per_forward": exchange[0] / options.steps,
                "bytes_sent_per_forward": sent // options.steps,
                "bytes_by_formula_per_forward": expected // options.steps,
                "relative_difference": float((got - want).norm() / want.norm()),
            }
        )
        assert sent == expected, (sent, expected)
    return found


def start(rank: int, ranks: int, store: str, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(minutes=10)
    )
    results.put(measure(rank, ranks, options))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="forwards per measurement; the median is reported")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder of the JSON file")
    options = parser.parse_args()
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (options.ranks, str(Path(folder) / "store"), options, results)
        torch.multiprocessing.spawn(start, given, nprocs=options.ranks)  # the failure of one is everybody's
    rows = [row for _ in range(options.ranks) for row in results.get()]
    rows.sort(key=lambda row: (list(CONFIGS).index(row["config"]), row["rank"]))
    print("config  rank  alone s  together s  exchange s  MiB sent  difference")
    for row in rows:
        print(
            f"{row['config']:<7} {row['rank']:>4} {row['seconds_per_forward_alone']:>8.3f} "
            f"{row['seconds_per_forward']:>11.3f} {row['exchange_seconds_per_forward']:>11.3f} "
            f"{row['bytes_sent_per_forward'] / 2**20:>9.2f} {row['relative_difference']:>11.1e}"
        )
    settings = {name: getattr(options, name) for name in ("ranks", "steps", "frames")}
    document = {
        "kind": "vdit_fast.sequence_parallel_bench",
        "version": 1,
        "settings": settings | {"threads": 1, "backend": "gloo"},
        "results": rows,
        "command": "python benchmarks/sequence_parallel.py " + " ".join(f"--{k} {v}" for k, v in settings.items()),
    }
    name = f"sequence_parallel_{options.ranks}.json"
    write(options.out / name, document)


if __name__ == "__main__":
    main()
