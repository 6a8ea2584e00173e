"""The examples in README.md and docs/quickstart.md that need no weights: as printed, but with a small clip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vdit_fast.demo.sampler import DemoPipeline

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_example_runs(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "DemoPipeline(" in block]
    draw = DemoPipeline.__call__

    def small(self: DemoPipeline, prompt: str, **options: Any) -> Any:
        assert options["steps"] <= 12  # a first example is over soon
        return draw(self, prompt, **{**options, "steps": 3, "frames": 6, "height": 32, "width": 32})

    monkeypatch.setattr(DemoPipeline, "__call__", small)
    space: dict[str, Any] = {}
    exec(compile(code, page, "exec"), space)
    assert space["clip"].shape == (6, 3, 32, 32) and 0 <= space["clip"].min() <= space["clip"].max() <= 1
    assert "layers" in capsys.readouterr().out
    assert not any("vdit_fast" in type(block.attn1.processor).__module__ for block in space["pipe"].transformer.blocks)
