"""diffusers' ``enable_parallelism``: planners run under it as in one process."""

from __future__ import annotations

from typing import Any

import context_cases
import diffusers
import pytest
import ranks
from ulysses_cases import Case, results

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "ContextParallelConfig"), reason="this diffusers has no context parallelism"
)

EVEN = (4, 7, 9)  # diffusers joins rows by a gather that gloo has for equal parts only
TWO: list[Case] = [
    *((planner, "planned", (planner, "accelerate", EVEN, 4, {})) for planner in ("draft", "adaspa", "sparse_vdit")),
    ("svg2", "planned", ("svg2", "parallel", EVEN, 4, {})),
    ("any heads", "planned", ("draft", "accelerate", EVEN, 5, {"ulysses_anything": True})),
    ("chronoedit", "chronoedit", ()),
    ("aside", "aside", ()),
]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return ranks.run(2, context_cases.run, TWO, seconds=300)


@pytest.mark.parametrize("name", [name for name, fn, _ in TWO if fn == "planned"])
def test_planners_are_those_of_one_process(two: list[dict[str, Any]], name: str) -> None:
    for rank in results(two, name):
        assert rank["far"] <= 1e-6 and rank["served"] and rank["report"] and rank["stock"], rank
        assert "shared already, by diffusers' enable_parallelism; use one of the two" in rank["twice"]


def test_a_relative_of_wan(two: list[dict[str, Any]]) -> None:
    for rank in results(two, "chronoedit"):
        assert rank["far"] <= 1e-6 and rank["calls"] == 2, rank


def test_what_is_not_served_runs_stock_and_says_why(two: list[dict[str, Any]]) -> None:
    for rank in results(two, "aside"):
        (reason,) = rank["ring"][0]
        assert "ring_degree 2: keys come in parts" in reason
        assert "vdit_fast.parallel.sequence_parallel shares the rows" in rank["both"]
        assert "whose plan for this family is not known" in rank["family"]


@pytest.mark.slow
def test_compiled_blocks() -> None:
    found = ranks.run(2, context_cases.run, [("compiled", "compiled", ())], seconds=420)
    for rank in results(found, "compiled"):
        assert rank["far"] <= 1e-5 and rank["calls"] == 8, rank
