"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests are small, and workers share the cores

MOST_WORKERS = 8  # each has a torch of its own in memory
FEW_FILES = 3


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Workers for ``-n auto``: one per core; none where starting them takes longer than the tests, or where the tests'
    order or output is asked for."""
    files = {argument.partition("::")[0] for argument in config.option.file_or_dir}
    few = 0 < len(files) <= FEW_FILES and all(name.endswith(".py") for name in files)
    if few or config.option.capture == "no" or any(config.getoption(name, False) for name in ("lf", "stepwise")):
        return 0
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # the plugin reads it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers alone, in the whole suite and on every worker."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run code in a fresh interpreter with extra environment variables; its failure fails the test."""

    def run(code: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
