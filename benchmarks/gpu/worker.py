"""Child process of the timings: runs problems one after another and stores each result as it comes.

python -m benchmarks.gpu.worker --out DIR --device cuda --until EPOCH NAME...
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from . import attention, machine
from .problems import Problem, problems
from .store import Store
from .supervise import BROKEN_DEVICE, Journal
from .timing import FULL, QUICK

SECTION = "timings"


def journal_path(folder: Path) -> Path:
    return folder / "logs" / "timings.journal"


def item_name(problem: Problem) -> str:
    return f"{SECTION}/{problem.name}"


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def spec_of(problem: Problem, device: str) -> dict[str, object]:
    return problem.spec(str(dtype_of(device)).removeprefix("torch."))


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--device", choices=("cuda", "cpu"), required=True)
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--until", type=float, required=True, help="epoch seconds: nothing starts that ends later")
    ap.add_argument("names", nargs="+")
    args = ap.parse_args(argv)
    store = Store(args.out, machine.identity(args.device))
    journal = Journal(journal_path(args.out))
    table = {p.name: p for p in problems(args.quick)}
    for name in args.names:
        one(table[name], store, journal, args.device, args.quick, args.until)
        if not machine.alive(args.device):
            sys.stdout.flush()
            os._exit(BROKEN_DEVICE)


def one(problem: Problem, store: Store, journal: Journal, device: str, quick: bool, until: float) -> None:
    """Run and store one problem, whatever happens to it."""
    item, spec = item_name(problem), spec_of(problem, device)
    effort = QUICK if quick else FULL
    estimate = 2.0 if quick else problem.estimate(effort.warmups + 1 + effort.samples * effort.launches)
    left = until - time.time()
    if estimate > left:
        why = f"budget: needs about {estimate:.0f} s, {max(0, left):.0f} s are left"
        store.write(item, SECTION, "skipped", reason=why, spec=spec)
        print(f"{item}: skipped, {why}", flush=True)
        return
    journal.begin(item, limit=2 * estimate + 45)
    start, before = time.monotonic(), machine.clocks() if device == "cuda" else None
    status, result = "ok", None
    reason: str | None = None
    try:
        if device == "cuda":
            torch.cuda.empty_cache()
        result = attention.run(
            problem, dtype=dtype_of(device), device=device, effort=effort, load_clocks=device == "cuda"
        )
        own = result["contenders"][attention.OWN]
        if attention.OWN in result["wrong"]:
            status, reason = "failed", f"wrong result: relative error {own['error']:.3g}"
    except attention.NotServed as error:
        status, reason = "skipped", f"the library does not do this: {error}"
    except Exception as error:
        status, reason = "failed", f"{type(error).__name__}: {str(error)[:1000]}"
        traceback.print_exc()
    clocks = {"before": before, "after": machine.clocks() if device == "cuda" else None}
    seconds = time.monotonic() - start
    store.write(item, SECTION, status, reason=reason, spec=spec, result=result, clocks=clocks, seconds=seconds)
    journal.end(item, status=status)
    print(f"{item}: {status}{', ' + reason if reason else ''}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
