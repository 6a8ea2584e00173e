"""Ranks that are given inputs of different sizes: an error of all of them in place of a dead process."""

from __future__ import annotations

from typing import Any

import agreement_cases
import diffusers
import pytest
import ranks
from ulysses_cases import Case, results

SEQUENCE: list[Case] = [
    (f"{what}{' later' * later}", "sequence", (what, later))
    for what, later in (("frames", False), ("frames", True), ("height", False), ("batch", True), ("text", False))
]
GUIDANCE: list[Case] = [
    ("calls", "guidance", ("calls", "frames")),
    ("batch", "guidance", ("batch", "height")),
    ("items", "guidance", ("batch", "batch")),
]
CONTEXT: list[Case] = [("context", "context", ("frames",))] if hasattr(diffusers, "ContextParallelConfig") else []


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return ranks.run(2, agreement_cases.run, [*SEQUENCE, *GUIDANCE, *CONTEXT, ("exchanges", "exchanges", ())])


def check(found: list[dict[str, Any]], name: str, begin: str) -> None:
    first, second = results(found, name)
    assert first["message"] == second["message"] and first["message"].startswith(
        f"{begin}: the ranks were given inputs of different sizes (rank 0: "
    )
    assert "; rank 1: " in first["message"] and "same arguments on every rank" in first["message"]
    assert max(first["far"], second["far"]) <= 1e-6, "equal inputs behind it"


@pytest.mark.parametrize("name", [name for name, _, _ in SEQUENCE])
def test_sequence_parallelism(two: list[dict[str, Any]], name: str) -> None:
    check(two, name, "sequence_parallel")
    message = results(two, name)[0]["message"]
    if name.startswith("frames"):
        assert "rank 0: a grid of (4, 4, 6) tokens, hidden_states [1, 96, 64] float32" in message
        assert "rank 1: a grid of (3, 4, 6) tokens, hidden_states [1, 72, 64] float32" in message


@pytest.mark.parametrize("name", [name for name, _, _ in GUIDANCE])
def test_guidance_parallelism(two: list[dict[str, Any]], name: str) -> None:
    check(two, name, "guidance_parallel")


@pytest.mark.skipif(not CONTEXT, reason="this diffusers has no context parallelism")
def test_context_parallelism_of_diffusers(two: list[dict[str, Any]]) -> None:
    check(two, "context", "context parallelism")


def test_what_it_costs(two: list[dict[str, Any]]) -> None:
    """A message in every forward, or in every generation where the host would wait for a device."""
    for rank in results(two, "exchanges"):
        assert rank["host"] == 5 and rank["device"] == 3, rank
        assert rank["host message"] == rank["device message"] and rank["host message"].startswith("here: the ranks")
