"""Cells of the tables that compare drawn clips."""

from __future__ import annotations

from typing import Any

from vdit_fast import report


def quality(row: dict[str, Any], key: str) -> str:
    """A measure of quality, empty where the row has none."""
    value = row.get(key)
    if value is None:
        return ""
    return f"{float(value):.1f}" if key.endswith("psnr") else f"{float(value):.4f}"


def seconds(row: dict[str, Any]) -> str:
    """Median and, of several, bounds."""
    text = str(report.format_seconds(row["median"]))
    if len(row["all"]) == 1:
        return text
    return f"{text} ({report.format_seconds(row['min'])} to {report.format_seconds(row['max'])})"


def ratio(row: dict[str, Any]) -> str:
    """Median and, of several, bounds."""
    bounds = (row["min"], row["max"]) if len(row["all"]) > 1 else (None, None)
    return str(report.format_ratio(row["median"], *bounds))
