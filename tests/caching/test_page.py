"""The example of docs/caching.md, as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
PAGE = Path(__file__).parents[2] / "docs" / "caching.md"


def test_the_bytes_of_modules(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "load_demo_model" in block]
    exec(compile(code, "docs/caching.md", "exec"), {})
    assert capsys.readouterr().out.strip() == code.strip().rpartition("  # ")[2]
    assert f"{3 * 6 * 8**3 * 128 * 4 * 2 * 2:,} bytes" in code
