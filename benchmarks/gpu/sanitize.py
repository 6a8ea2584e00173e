"""Small problems for compute-sanitizer: those of the kernel tests, until the time is up.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize --seconds 60
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

import vdit_fast

from .machine import ROOT


def main() -> None:
    ap = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ap.add_argument("--seconds", type=float, default=60)
    ap.add_argument("--device", default="cuda")
    args = ap.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "emulator"))
    from cases import ALL, build

    end = time.monotonic() + args.seconds
    names: list[str] = []
    # Every nth case first: kinds of cases lie together in the table.
    order = [case for start in range(7) for case in ALL[start::7]]
    for case in order:
        if names and time.monotonic() > end:
            break
        problem = build(case)
        options: dict[str, Any] = {
            name: o.to(args.device) if isinstance(o, Tensor) else o for name, o in problem.options.items()
        }
        options["segments"] = [tuple(t.to(args.device) for t in pair) for pair in problem.options["segments"]]
        q, k, v = (t.to(args.device) for t in (problem.q, problem.k, problem.v))
        plan = problem.plan.to(args.device) if problem.plan is not None else None
        vdit_fast.attention(q, k, v, plan, return_lse=True, **options)
        if args.device == "cuda":
            torch.cuda.synchronize()
        names.append(case.name)
    print(json.dumps({"cases": len(names), "of": len(ALL), "names": names}))


if __name__ == "__main__":
    main()
