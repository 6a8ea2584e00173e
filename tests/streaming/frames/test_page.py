"""The examples of docs/frame_schedules.md, as printed, on a smaller canvas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "frame_schedules.md"


def test_the_examples_run(capsys) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    small = code.replace("64, 64)", "16, 16)")
    assert small.count("16, 16)") == 2
    space: dict[str, Any] = {}
    exec(compile(small, "docs/frame_schedules.md", "exec"), space)
    assert space["clip"].shape == (1, 3, 16, 16, 16) and space["clip"].isfinite().all()
    assert capsys.readouterr().out.count("[1, 3, 2, 16, 16]") == 3
    assert len(space["model"].handle.roots[0].session.around_heads) == 1  # of the last example
    space["remove"]()
