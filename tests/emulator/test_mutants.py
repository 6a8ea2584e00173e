"""Every planted bug still fits the source. Planting them is run_mutants.py's work, which takes long."""

from __future__ import annotations

import pytest
from mutants import CSRC, FOLDER, Mutant, all_mutants

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_patch_applies_to_exactly_one_place(mutant: Mutant) -> None:
    assert mutant.old != mutant.new
    assert (CSRC / mutant.file).read_text().count(mutant.old) == 1
    assert (FOLDER / mutant.tests).exists()


def test_names_are_unique() -> None:
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names) >= 40
