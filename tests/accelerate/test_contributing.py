"""The adapter that CONTRIBUTING.md shows is the one in the package, and so is its test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["python/vdit_fast/models/ltx_video.py", "tests/accelerate/families/ltx_video.py"])
def test_the_shown_file_is_the_real_one(path: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", text, flags=re.DOTALL)
    assert shown == [(ROOT / path).read_text(encoding="utf-8")]
