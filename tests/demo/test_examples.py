"""The examples in README.md and the docs that need no weights: as printed, but with a small clip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vdit_fast.demo.sampler import DemoPipeline

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]


def block(page: str, word: str) -> str:
    """The one Python block of a page with this word in it."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [code for code in blocks if word in code]
    return code


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_example_runs(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draw = DemoPipeline.__call__

    def small(self: DemoPipeline, prompt: str, **options: Any) -> Any:
        assert options["steps"] <= 12  # a first example is over soon
        return draw(self, prompt, **{**options, "steps": 3, "frames": 6, "height": 32, "width": 32})

    monkeypatch.setattr(DemoPipeline, "__call__", small)
    space: dict[str, Any] = {}
    exec(compile(block(page, "DemoPipeline("), page, "exec"), space)
    assert space["clip"].shape == (6, 3, 32, 32) and 0 <= space["clip"].min() <= space["clip"].max() <= 1
    assert "layers" in capsys.readouterr().out
    assert not any("vdit_fast" in type(item.attn1.processor).__module__ for item in space["pipe"].transformer.blocks)


def test_memory_rows(capsys: pytest.CaptureFixture[str]) -> None:
    page = "docs/segments.md"
    space: dict[str, Any] = {}
    exec(compile(block(page, "DemoPipeline("), page, "exec"), space)
    out = capsys.readouterr().out
    assert "memory: 40 rows in every block" in out and float(out.split()[-1]) > 1e-3
    assert space["memory"].shape == (8, 3, 32, 32)


def test_a_long_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from vdit_fast import report

    monkeypatch.chdir(tmp_path)
    page = "docs/quickstart.md"
    code = block(page, "stream(")
    assert "latent_size=(48, 48)" in code and "frames=60" in code
    code = code.replace("(48, 48)", "(16, 16)").replace("frames=60", "frames=27")
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        *(f"frames {first} to {first + 2}" for first in range(0, 27, 3)),
        "long.mkv",
    ]
    assert report.read_video(tmp_path / "long.mkv").shape == (27, 3, 16, 16)
