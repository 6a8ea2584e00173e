"""Operators on the instruction sets that this processor has and does not choose: their own tests, run again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vdit_fast

ISAS = ["generic", "avx2", "avx512"]
LIKE_THE_REFERENCE = "equals_the_reference or as_exact_as_torch and float16 or nan or not_finite or test_edges"
TESTS = {
    "adaln": LIKE_THE_REFERENCE,
    "attention": "odd_lengths or few_queries",
    "block_mass": "odd_sizes",
    "cache": LIKE_THE_REFERENCE,
    "cache_e4m3": LIKE_THE_REFERENCE,
    "clusters": "nearest_centroids and 300 or lowest_index or in_range or test_means and one_long or any_lengths",
    "combine_rows": LIKE_THE_REFERENCE,
    "linear_attention": LIKE_THE_REFERENCE,
    "merge": "every_16_bit_number",
    "pack": "error_of_e4m3 or every_number_of_16_bits and 32-torch",
    "rows": "gate_and_add and (100-contiguous or 7-batch)",
    "select": "equals_the_reference and (97 or 630)",
    "short_attention": LIKE_THE_REFERENCE,
    "softmax_mass": "odd_sizes",
}
"""By file; ``qk_norm_rope`` has a slow test of its own."""


USED = vdit_fast._info.device_probe()["cpu_isa"]
RUN = """
import sys, pytest, vdit_fast
print("used:", vdit_fast._info.device_probe()["cpu_isa"])
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_their_tests_pass_there_too(isa: str) -> None:
    """All in one process, since the choice is made once."""
    if ISAS.index(isa) >= ISAS.index(USED):
        pytest.skip(f"{isa} is what the other tests ran, or this processor lacks it")
    files = [f"test_{name}.py" for name in TESTS]
    select = " or ".join(f"test_{name}.py and ({tests})" for name, tests in TESTS.items())
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-v", "-p", "no:cacheprovider", *files, "-k", f"not gpu and ({select})"],
        cwd=Path(__file__).parent,
        env={**os.environ, "VDIT_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [text for text in (f"used: {isa}", *(f"{file}::" for file in files)) if text not in done.stdout] == []


@pytest.mark.skipif(ISAS[-1] == USED, reason=f"this processor has {ISAS[-1]}")
def test_a_set_that_this_processor_lacks_falls_back(run_python: Callable[..., str]) -> None:
    code = "import vdit_fast; print(vdit_fast._info.device_probe()['cpu_isa'])"
    assert run_python(code, VDIT_CPU_ISA=ISAS[-1]).strip() == USED
