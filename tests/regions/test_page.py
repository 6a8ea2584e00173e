"""The example of docs/regions.md, as printed, with fewer steps and frames."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "regions.md"


def test_the_example_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "load_demo_model" in block]
    begin, _, end = code.partition("clip = ")
    space: dict[str, Any] = {}
    exec(compile(begin.replace("range(24)", "range(1)"), "docs/regions.md", "exec"), space)
    assert "steps=10)" in end
    space["clip"] = space["pipe"]("red circle right, blue square up", steps=10, frames=1).clip
    handle = space["handle"]
    assert handle.stats()["regions"] == {"masked": {}, "prompted": {step: 1 for step in range(6)}}
    assert sum(handle.stats()["positions"].values()) == 2, "one step of ten, two guidance branches"
    exec(end.splitlines()[1], space)
    assert handle.stats()["regions"] is None
