"""Reads the tables of docs/coverage.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coverage.md"
CLASS = re.compile(r"`([A-Z]\w*[a-z]\w*)`")


def table(section: str) -> list[list[str]]:
    """Rows, without the header, of the first table under a heading of the second level."""
    _, _, rest = PAGE.read_text().partition(f"\n## {section}\n")
    assert rest, f"docs/coverage.md has no section {section!r}"
    body = rest.split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    width = len(rows[0])
    assert all(len(row) == width for row in rows), section
    return rows[2:]


def classes(cell: str) -> list[str]:
    """Names in code type that are spelled like a class."""
    return CLASS.findall(cell)
