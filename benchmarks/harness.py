"""What the scripts beside this one have in common: their options, how they time, and the document that they write."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vdit_fast import report


def parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """For a script with this docstring: ``--out``, a folder, and where there are rounds ``--rounds``."""
    ap = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    if rounds is not None:
        ap.add_argument("--rounds", type=int, default=rounds)
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    return ap


def in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call in every round; before that all of them run ``warm`` times. They take turns, so that a slow
    spell of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm, rounds):
        for name, call in calls.items():
            start = clock()
            call()
            spent = clock() - start
            if turn >= 0:
                times[name].append(spent)
    return times


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write what was measured together with where it was; missing folders are made."""
    print("\nwritten:", report.write_json(path, {**document, "environment": report.environment()}))
