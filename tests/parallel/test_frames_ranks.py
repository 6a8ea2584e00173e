"""Causal frames, kept frames and regions give on two ranks what they give in one process."""

from __future__ import annotations

import frames_cases
import ranks


def test_two_ranks() -> None:
    """5 x 7 x 9 tokens and 3 heads: neither halves."""
    for found in ranks.run(2, frames_cases.run, seconds=200):
        assert len(found) == 5
        for name, result in found.items():
            assert result["far"] < 1e-6, name
