"""Rotary embeddings from explicit position ids: ids, frequencies, tables, and what papers change about them."""

from __future__ import annotations

from .boxes import AnchoredBoxes, anchored_rows
from .ids import MarkedSequence, extended_ids, grid_ids, marked_sequence
from .scaling import frequency_aware, interpolated, ntk, proportional_scale, time_aware
from .tables import frequencies, rope_tables, take_rows

__all__ = [
    "AnchoredBoxes",
    "MarkedSequence",
    "anchored_rows",
    "extended_ids",
    "frequencies",
    "frequency_aware",
    "grid_ids",
    "interpolated",
    "marked_sequence",
    "ntk",
    "proportional_scale",
    "rope_tables",
    "take_rows",
    "time_aware",
]
