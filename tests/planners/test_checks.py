"""The bounds in the messages of bad knobs."""

from __future__ import annotations

import pytest

from vdit_fast.planners._checks import number


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"least": 0, "most": 1}, "x must be a finite number between 0 and 1, got 7.5"),
        ({"least": 8}, "x must be a finite number ≥ 8, got 7.5"),
        ({"most": 3}, "x must be a finite number ≤ 3, got 7.5"),
    ],
)
def test_bounds_in_words(bounds: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        number("x", 7.5, **bounds)
    with pytest.raises(TypeError, match="x must be a finite number"):
        number("x", "7.5", **bounds)
