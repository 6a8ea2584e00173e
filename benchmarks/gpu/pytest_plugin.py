"""Pytest plugin: notes every test in a journal, ends the process when the GPU is broken, sends primitives to the GPU.

VDIT_JOURNAL     the journal file
VDIT_TEST_LIMIT  seconds a test may take
VDIT_PRIMITIVES  library of primitives.cu: tests/emulator/test_primitives.py then runs on the device
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from benchmarks.gpu.machine import ROOT, alive
from benchmarks.gpu.supervise import BROKEN_DEVICE, Journal

journal = Journal(Path(os.environ["VDIT_JOURNAL"]))
limit = float(os.environ.get("VDIT_TEST_LIMIT", "120"))
reports: dict[str, list[pytest.TestReport]] = {}

if "VDIT_PRIMITIVES" in os.environ:
    # Before conftest.py and the tests import these names.
    sys.path.insert(0, str(ROOT / "tests" / "emulator"))
    from benchmarks.gpu.primitives import run_case

    import emulator

    emulator.run_case = run_case
    emulator.POLICIES = [emulator.LAZY_FORWARD]  # a GPU has one schedule


def pytest_runtest_logstart(nodeid: str) -> None:
    reports[nodeid] = []
    journal.begin(nodeid, limit)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    reports[report.nodeid].append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    phases = reports.pop(nodeid)
    failed = [r for r in phases if r.failed]
    skipped = [r for r in phases if r.skipped]
    outcome = "failed" if failed else "skipped" if skipped else "passed"
    text = str((failed or skipped)[0].longrepr)[-2000:] if failed or skipped else ""
    journal.end(nodeid, outcome=outcome, seconds=round(sum(r.duration for r in phases), 3), text=text)
    torch = sys.modules.get("torch")
    if failed and torch is not None and torch.cuda.is_available() and not alive("cuda"):
        os._exit(BROKEN_DEVICE)
