"""Operators on the instruction sets that this processor has and does not choose: their own tests, run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from narrower_isa import NARROWER, run_there

NAMES = ("adaln", "cache", "cache_e4m3", "combine_rows", "linear_attention", "short_attention")
FILES = [f"test_{name}.py" for name in NAMES]
TESTS = "equals_the_reference or as_exact_as_torch and float16 or test_nan or test_a_nan or not_finite or test_edges"


@pytest.mark.parametrize("isa", NARROWER)
def test_their_tests_pass_there_too(isa: str) -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", TESTS]
    assert " passed" in run_there(isa, arguments, Path(__file__).parent)
