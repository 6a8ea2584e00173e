"""One item of a section that runs in a child process: budget, journal, clocks and result, whatever happens to it."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import machine
from .store import Store
from .supervise import Journal

__all__ = ["arguments", "guarded"]

Measure = Callable[[], tuple[dict[str, Any], str | None]]
"""Returns the result, and what is wrong with it or None."""


def arguments(text: str | None, argv: list[str] | None) -> argparse.Namespace:
    """What every child process is given."""
    ap = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--device", choices=("cuda", "cpu"), required=True)
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--until", type=float, required=True, help="epoch seconds: nothing starts after")
    ap.add_argument("names", nargs="+")
    return ap.parse_args(argv)


def guarded(
    item: str,
    spec: dict[str, Any],
    store: Store,
    journal: Journal,
    args: argparse.Namespace,
    least: float,
    work: Measure,
) -> None:
    """Run and store one item that needs about ``least`` seconds."""
    section, left = item.partition("/")[0], args.until - time.time()
    least = 0.0 if args.quick else least
    if left < least:
        why = f"budget: needs about {least:.0f} s, {max(0, left):.0f} s are left"
        store.write(item, section, "skipped", reason=why, spec=spec)
        journal.end(item, status="skipped")
        return
    journal.begin(item, limit=240)
    cuda = args.device == "cuda"
    start, before = time.monotonic(), machine.clocks() if cuda else None
    status, result, reason = "ok", None, None
    try:
        result, reason = work()
        if reason is not None:
            status = "failed"
    except ImportError as error:
        status, reason = "skipped", f"not installed: {error}"
    except Exception as error:
        status, reason = "failed", f"{type(error).__name__}: {str(error)[:1000]}"
        traceback.print_exc()
    if cuda:
        torch.cuda.empty_cache()
    clocks = {"before": before, "after": machine.clocks() if cuda else None}
    seconds = time.monotonic() - start
    store.write(item, section, status, reason=reason, spec=spec, result=result, clocks=clocks, seconds=seconds)
    journal.end(item, status=status)
    print(f"{item}: {status}{', ' + reason if reason else ''}, {seconds:.1f} s", flush=True)
