"""Operators on the instruction sets that this processor has and does not choose: their own tests, run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vdit_fast

ISAS = ["generic", "avx2", "avx512"]
FILES = [f"test_{name}.py" for name in ("adaln", "cache", "combine_rows", "linear_attention", "short_attention")]
TESTS = "equals_the_reference or as_exact_as_torch and float16 or test_nan or test_a_nan or not_finite or test_edges"


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_their_tests_pass_there_too(isa: str) -> None:
    if ISAS.index(isa) >= ISAS.index(vdit_fast._info.device_probe()["cpu_isa"]):
        pytest.skip(f"{isa} is what the other tests ran, or this processor lacks it")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", TESTS],
        cwd=Path(__file__).parent,
        env={**os.environ, "VDIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
