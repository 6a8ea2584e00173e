"""The example of docs/streaming.md, as printed, on a smaller canvas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
PAGE = Path(__file__).parents[2] / "docs" / "streaming.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "load_demo_model" in block]
    assert "latent_size=(64, 64)" in code and "frames=12" in code
    space: dict[str, Any] = {}
    exec(compile(code.replace("(64, 64)", "(16, 16)"), "docs/streaming.md", "exec"), space)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["0", "0"], ["1", "3"], ["2", "6"], ["3", "9"]]
    assert "[1, 3, 3, 16, 16]" in lines[0] and space["chunk"].frames.min() >= 0
    assert not any("vdit_fast" in type(block.attn1.processor).__module__ for block in space["model"].blocks)
