"""Test runs that survive crashes and hangs: what is left over runs again in a fresh process."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .supervise import Journal, tail, watch

CLEAN_EXIT = (0, 1, 5)  # passed, some failed, none collected


def run_tests(
    arguments: Sequence[str],
    folder: Path,
    name: str,
    *,
    seconds: float,
    test_limit: float,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run pytest with ``arguments``; returns counts, what was not passed with its text, and how it ended.

    A test that hangs longer than ``test_limit`` or takes the process with it counts as "hung" or "died"; the tests
    after it run in another process.
    """
    journal, log = Journal(folder / f"{name}.journal"), folder / f"{name}.log"
    log.unlink(missing_ok=True)
    tests: dict[str, dict[str, Any]] = {}
    start, ended = time.monotonic(), "budget"
    while (left := seconds - (time.monotonic() - start)) > 0:
        journal.clear()
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib"]
        command += ["-p", "benchmarks.gpu.pytest_plugin", "-p", "no:cacheprovider", *arguments]
        command += [f"--deselect={test}" for test in tests]
        threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # the tests' own default is 1
        watched = {"VDIT_JOURNAL": str(journal.path), "VDIT_TEST_LIMIT": str(test_limit), "OMP_NUM_THREADS": threads}
        child = watch(command, journal, seconds=left, log=log, env={**watched, **(env or {})})
        found = journal.outcomes()
        tests |= found
        if child.how == "finished" or (child.how == "died" and child.code in CLEAN_EXIT):
            ended = "finished"
            break
        if child.how == "budget":
            break
        if child.item is not None and child.item not in tests:
            tests[child.item] = {"outcome": child.how, "seconds": test_limit, "text": tail(log)}
        elif not found:
            ended = f"pytest ended with exit code {child.code}"  # a collection error, say
            break
    counts = Counter(t["outcome"] for t in tests.values())
    return {
        "ended": ended,
        "seconds": round(time.monotonic() - start, 1),
        "counts": dict(counts),
        "tests": len(tests),
        "slowest": sorted(((t["seconds"], test) for test, t in tests.items()), reverse=True)[:5],
        "not_passed": {test: t for test, t in sorted(tests.items()) if t["outcome"] not in ("passed", "skipped")},
        "skips": sorted({t["text"] for t in tests.values() if t["outcome"] == "skipped"})[:10],
        "log": tail(log, 30) if ended != "finished" or not tests else "",
    }


def verdict(result: Mapping[str, Any]) -> tuple[str, str | None]:
    """Status and reason of a test run for the store."""
    counts = result["counts"]
    bad = {name: n for name, n in counts.items() if name not in ("passed", "skipped")}
    if bad:
        return "failed", ", ".join(f"{n} {name}" for name, n in sorted(bad.items()))
    if result["ended"] == "budget":
        return "skipped", f"budget: {result['tests']} tests ran, the others had no time"
    if result["ended"] != "finished":
        return "failed", f"not all tests ran: {result['ended']}"
    if not counts.get("passed"):
        return "failed", "no test passed"
    return "ok", None
