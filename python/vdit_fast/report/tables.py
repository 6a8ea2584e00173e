"""Text tables and numbers for people; no dependencies."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

MISSING = "-"


def format_seconds(seconds: float | None) -> str:
    """A duration with three digits and a fitting unit: ``812 ns``, ``4.21 ms``, ``12.3 s``, ``3 min 05 s``."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if math.isinf(seconds):
        return "inf"
    if seconds == 0:
        return "0 s"
    if round(seconds) >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if round(seconds) >= 100:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale * 0.9995:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def format_ratio(middle: float | None, low: float | None = None, high: float | None = None) -> str:
    """A speed-up with its spread: ``1.82x (1.75-1.90)``; without both bounds ``1.82x``."""
    if middle is None or math.isnan(middle):
        return MISSING
    text = f"{_three_digits(middle)}x"
    if low is None or high is None:
        return text
    if low > high:
        raise ValueError(f"low is {low} and high is {high}; pass low <= high")
    return f"{text} ({_three_digits(low)}-{_three_digits(high)})"


def format_count(value: float | None) -> str:
    """A whole number with thousands separators: ``75,600``."""
    return MISSING if value is None else f"{round(value):,}"


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.253 -> ``25.3%``."""
    return MISSING if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f}%"


def format_bytes(count: float | None) -> str:
    """A byte count in binary units: ``1.50 GiB``."""
    if count is None:
        return MISSING
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    index = 0
    while abs(value) >= 1024 and index < len(units) - 1:
        value, index = value / 1024, index + 1
    return f"{value:.0f} B" if index == 0 else f"{_three_digits(value)} {units[index]}"


def _width(text: str) -> int:
    # East Asian wide characters take two terminal columns
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split())


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def table(
    rows: Sequence[Sequence[Any]], headers: Sequence[str], *, style: str = "plain", align: str | None = None
) -> str:
    """Rows as a text table: ``style`` "plain" (terminal) or "markdown".

    ``align`` is one letter per column, l or r; by default columns of numbers are right-aligned. None shows as ``-``.
    Raises ValueError when a row's length differs from the headers', or for an unknown style or alignment.
    """
    if style not in ("plain", "markdown"):
        raise ValueError(f"style is {style!r}; pass 'plain' or 'markdown'")
    count = len(headers)
    for index, row in enumerate(rows):
        if len(row) != count:
            raise ValueError(f"rows[{index}] has {len(row)} cells for {count} headers; pass one cell per header")
    if align is None:
        align = "".join("r" if rows and all(_is_number(row[c]) for row in rows) else "l" for c in range(count))
    if len(align) != count or set(align) - set("lr"):
        raise ValueError(f"align is {align!r}; pass {count} letters, each l or r")
    cells = [[_cell(h) for h in headers], *([_cell(v) for v in row] for row in rows)]
    if style == "markdown":
        cells = [[text.replace("|", "\\|") for text in row] for row in cells]
    floor = 3 if style == "markdown" else 0
    widths = [max([floor, *(_width(row[c]) for row in cells)]) for c in range(count)]
    lines = []
    for row in cells:
        padded = []
        for text, width, side in zip(row, widths, align, strict=True):
            space = " " * (width - _width(text))
            padded.append(space + text if side == "r" else text + space)
        lines.append("| " + " | ".join(padded) + " |" if style == "markdown" else "  ".join(padded).rstrip())
    if style == "markdown":
        marks = ["-" * (w - 1) + ":" if a == "r" else "-" * w for w, a in zip(widths, align, strict=True)]
        lines.insert(1, "| " + " | ".join(marks) + " |")
    else:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
