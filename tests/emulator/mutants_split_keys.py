"""Bugs for the host entry's choice of parts of the keys: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant


def _bug(name: str, old: str, new: str, select: str) -> Mutant:
    return Mutant("attention", f"parts: {name}", "kernels/attention/forward.cu", old, new, "test_split_keys.py", select)


MUTANTS = [
    _bug("the rounds are not counted", "ceil_div(items * parts, resident) *", "items * parts / resident *", "rounds"),
    _bug("a part costs what an item does", "kPartStages = 4", "kPartStages = 1", "rounds"),
    _bug("the most parts win", "cost < least", "cost <= least", "rounds"),
    _bug(
        "parts of any length", "limit = stages / 4 < kMaxSplits ? stages / 4", "limit = stages < 32 ? stages", "rounds"
    ),
    _bug("one item per tile", "tiles + (rows - tiles) / w.rows", "tiles", "lie"),
]
