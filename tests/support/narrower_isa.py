"""The instruction sets that this processor has and does not choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vdit_fast

ISAS = ["generic", "avx2", "avx512"]
NARROWER = ISAS[:-1]


def run_there(isa: str, arguments: list[str], folder: Path) -> str:
    """What Python prints with these arguments in a folder, in a process that uses ``isa``; skips where other tests use
    it anyway or the processor lacks it."""
    if ISAS.index(isa) >= ISAS.index(vdit_fast._info.device_probe()["cpu_isa"]):
        pytest.skip(f"{isa} is what the other tests ran, or this processor lacks it")
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "VDIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
