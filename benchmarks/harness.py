"""What the scripts beside this one have in common: their options, and the document that they write."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdit_fast import report


def parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """For a script with this docstring: ``--out``, a folder, and where there are rounds ``--rounds``."""
    ap = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    if rounds is not None:
        ap.add_argument("--rounds", type=int, default=rounds)
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    return ap


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write what was measured together with where it was; missing folders are made."""
    print("\nwritten:", report.write_json(path, {**document, "environment": report.environment()}))
