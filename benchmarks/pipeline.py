"""Predicts runs of the stage pipeline on this machine from a run of one process, and compares.

    python benchmarks/pipeline.py --rounds 3 --out benchmarks/results/cpu

Every round draws the same clip of the demo model with 1, 2 and 4 processes (torchrun, gloo, one thread each). Runs of
one process give the seconds of a layer, of what lies before and behind the layers and of a scheduler step, with as many
of them at once as there are processors, since busy processors slow each other down; messages of the real size between
two idle processes give the link. From these and the number of processors, and nothing else, the simulator predicts the
other runs. "Replayed" is the simulator fed with the seconds that every forward really took: whether order and waiting
are right. Times begin with the first forward of rank 0 and end with its last result. Run it on an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import parser, write

from vdit_fast import report
from vdit_fast.accelerate import accelerate
from vdit_fast.demo.model import load_demo_model
from vdit_fast.demo.prompts import embed
from vdit_fast.parallel import StagePipeline, split_layers
from vdit_fast.parallel.demo import x0_sampler
from vdit_fast.parallel.simulator import Link, Pipeline, simulate
from vdit_fast.parallel.trace import read_traces

PROMPT = "red circle right, blue square up"
PINGS = 40


# ---------------------------------------------------------------------------------------------------- in the processes


def draw(options: argparse.Namespace) -> None:
    """One rank of a run; leaves its trace, and alone also the seconds of the layers of every forward."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    model: Any = load_demo_model()
    spans: list[list[float]] = []
    if ranks == 1:
        model.blocks[0].register_forward_pre_hook(lambda *_: spans.append([time.monotonic()]))
        model.blocks[-1].register_forward_hook(lambda *_: spans[-1].append(time.monotonic()))
    pipeline = StagePipeline(accelerate(model, "exact"))
    text = embed(PROMPT)[None]
    for _ in pipeline.generate(
        x0_sampler(options.steps),
        (3, options.size, options.size),
        {"encoder_hidden_states": torch.cat((text, torch.zeros_like(text)))},
        blocks=options.blocks,
        num_per_block=options.num_per_block,
        num_cat=options.num_cat,
        guidance=3.0,
        seed=0,
    ):
        pass
    pipeline.trace.write(options.scratch, pipeline.facts())
    began = pipeline.trace.began
    (options.scratch / "spans.json").write_text(json.dumps([[t - began for t in s if len(s) == 2] for s in spans]))


def ping(options: argparse.Namespace) -> None:
    """Half of the time of a message there and back, for an empty one and one of the real size."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for size in (16, options.bytes):
        buffer, times = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(PINGS):
            begin = time.monotonic()
            for turn in (0, 1):
                if rank == turn:
                    dist.send(buffer, 1 - rank)
                else:
                    dist.recv(buffer, 1 - rank)
            times.append((time.monotonic() - begin) / 2)
        found[size] = statistics.median(times[PINGS // 4 :])
    if rank == 0:
        (options.scratch / "link.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------------------------------- from the outside


def launch(ranks: int, options: argparse.Namespace, scratch: Path, worker: str, size: int = 0) -> None:
    """This script once per rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    scratch.mkdir()
    given = {"steps": options.steps, "blocks": options.blocks, "size": options.size, "scratch": scratch}
    given |= {"num-per-block": options.num_per_block, "num-cat": options.num_cat, "bytes": size, "worker": worker}
    command = [sys.executable, *launcher, __file__, *(str(w) for k, v in given.items() for w in (f"--{k}", v))]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=options.limit
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def seconds(trace: dict[str, Any], kind: str) -> list[tuple[int, int, float, float]]:
    """(iteration, block, begin, end) of the events of a kind."""
    return [tuple(event[1:]) for event in trace["events"] if event[0] == kind]  # type: ignore[misc]


def calibrate(folders: list[Path]) -> dict[str, float]:
    """What runs of one process say together."""
    ordinary, newest, before, behind, steps = [], [], [], [], []
    for scratch in folders:
        (trace,) = read_traces(scratch)
        spans = json.loads((scratch / "spans.json").read_text())
        forwards = seconds(trace, "compute")
        spans = [s for s in spans if len(s) == 2][-len(forwards) :]  # before them, the embeddings of all steps are made
        last = -1
        for (iteration, _, begin, end), (first, final) in zip(forwards, spans, strict=True):
            assert begin <= first <= final <= end
            (ordinary if iteration == last else newest).append(final - first)
            before.append(first - begin)
            behind.append(end - final)
            last = iteration
        steps += [end - begin for *_, begin, end in seconds(trace, "step")]
    layers = statistics.fmean(ordinary)
    return {
        "layers": layers,
        "newest": statistics.fmean(newest) / layers,
        "before": statistics.fmean(before),
        "behind": statistics.fmean(behind),
        "step": statistics.fmean(steps),
        "hop_bytes": trace["hop_bytes"],
        "first_return_bytes": trace["result_bytes"][0],
        "return_bytes": trace["result_bytes"][1],
        "measured": statistics.fmean(makespan(read_traces(scratch)) for scratch in folders),
    }


def makespan(traces: list[dict[str, Any]]) -> float:
    events = traces[0]["events"]
    return max(e[4] for e in events) - min(e[3] for e in events if e[0] == "compute")


def pipeline_of(ranks: int, layers: int, one: dict[str, float], link: Link, options: argparse.Namespace) -> Pipeline:
    return Pipeline(
        steps=options.steps,
        blocks=options.blocks,
        stage=[len(own) * one["layers"] / layers for own in split_layers(layers, ranks)],
        embed=one["before"],
        head=one["behind"],
        update=one["step"],
        hop_bytes=one["hop_bytes"],
        return_bytes=one["return_bytes"],
        first_return_bytes=one["first_return_bytes"],
        link=link,
        newest=one["newest"],
        cores=options.cores,
    )


def one_round(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    launch(1, options, folder / "1", "draw")
    copies = [folder / f"together.{copy}" for copy in range(max(1, int(options.cores)))]
    with ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(lambda scratch: launch(1, options, scratch, "draw"), copies))
    alone, together = calibrate([folder / "1"]), calibrate(copies)
    size = int(together["hop_bytes"])
    launch(2, options, folder / "link", "ping", size)
    small, whole = json.loads((folder / "link" / "link.json").read_text()).values()
    link = Link(size / max(whole - small, 1e-9), small)
    found: dict[str, Any] = {
        "alone": alone,
        "together": together,
        "link": {"bytes_per_second": link.bytes_per_second, "latency": small},
    }
    layers = sum(trace["layers"] for trace in read_traces(folder / "1"))
    for ranks in options.ranks:
        launch(ranks, options, folder / str(ranks), "draw")
        traces = read_traces(folder / str(ranks))
        model, took = pipeline_of(ranks, layers, together, link, options), makespan(traces)
        work = [[end - begin for *_, begin, end in seconds(t, "compute")] for t in traces]
        run = simulate(model)
        replayed = simulate(replace(model, cores=None), list(zip(*work, strict=True))).latency
        found[str(ranks)] = {
            "measured": took, "predicted": run.latency, "ratio": run.latency / took, "replayed": replayed / took,
            "computing": [sum(w) for w in work], "messages": [sum(t["sent"][0] for t in traces), run.messages],
            "bytes": [sum(t["sent"][1] for t in traces), run.bytes],
        }  # fmt: skip
    return found


def main() -> None:
    ap = parser(__doc__, rounds=3)
    ap.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--blocks", type=int, default=6)
    ap.add_argument("--num-per-block", type=int, default=8)
    ap.add_argument("--num-cat", type=int, default=4)
    ap.add_argument("--size", type=int, default=64, help="pixels of an edge, a multiple of 4")
    ap.add_argument("--cores", type=float, default=len(os.sched_getaffinity(0)), help="processors that ranks share")
    ap.add_argument("--limit", type=float, default=3600, help="seconds that a run may take")
    for name in ("--worker", "--scratch", "--bytes"):  # of a rank
        ap.add_argument(name, type={"--scratch": Path, "--bytes": int}.get(name, str), help=argparse.SUPPRESS)
    options = ap.parse_args()
    if options.worker:
        return ping(options) if options.worker == "ping" else draw(options)
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(options, Path(folder)))
    rows, results = [], {}
    for ranks in map(str, options.ranks):
        took, said, ratio, again = (
            [r[ranks][key] for r in rounds] for key in ("measured", "predicted", "ratio", "replayed")
        )
        alone = [r["alone"]["measured"] / r[ranks]["measured"] for r in rounds]
        assert all(r[ranks][what][0] == r[ranks][what][1] for r in rounds for what in ("messages", "bytes"))
        results[ranks] = {"ratio": statistics.median(ratio), "ratio_min": min(ratio), "ratio_max": max(ratio)}
        middle = report.format_seconds(statistics.median(took)), report.format_seconds(statistics.median(said))
        said_of_took = f"{statistics.median(ratio):.3f} ({min(ratio):.3f}-{max(ratio):.3f})"
        over_one = report.format_ratio(statistics.median(alone), min(alone), max(alone))
        rows.append((ranks, *middle, said_of_took, f"{statistics.median(again):.3f}", over_one))
    heads = ("processes", "measured", "predicted", "predicted / measured", "replayed / measured", "over one process")
    print(report.table(rows, heads))
    document = {
        "kind": "vdit_fast.pipeline_bench",
        "version": 1,
        "settings": {k: getattr(options, k) for k in ("steps", "blocks", "num_per_block", "num_cat", "size", "cores")},
        "results": results,
        "rounds": rounds,
        "command": f"python benchmarks/pipeline.py --rounds {options.rounds}",
    }
    write(options.out / "pipeline.json", document)


if __name__ == "__main__":
    main()
