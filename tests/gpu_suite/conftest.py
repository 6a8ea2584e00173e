"""The GPU suite on a machine without a GPU: its logic, with small problems."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(scope="session")
def run_suite() -> Callable[..., int]:
    """Run ``python -m benchmarks.gpu --device cpu --quick`` in this process; returns its exit code."""
    from benchmarks.gpu.__main__ import main

    def run(out: Path, *options: str, budget: float = 300) -> int:
        return main(["--device", "cpu", "--quick", "--budget", str(budget), "--out", str(out), *options])

    return run


@pytest.fixture(scope="session")
def finished(run_suite: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run; tests must not change it."""
    out = tmp_path_factory.mktemp("suite") / "gpu"
    assert run_suite(out) == 0
    return out
