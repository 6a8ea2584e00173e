"""``vdit-fast demo`` and ``plot`` on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("av")


@pytest.fixture
def options(tiny_weights: Path, tmp_path: Path) -> list[object]:
    small = ["--frames", 6, "--size", 32, "--steps", 2, "--repeats", 1]
    return [
        "--weights",
        tiny_weights,
        "--out",
        tmp_path / "out",
        *small,
        "--set",
        "attention.min_tokens=0",
        "--set",
        "attention.pool=[4,4]",
    ]


def test_the_table_and_the_files(run: Callable[..., Any], options: list[object], tmp_path: Path) -> None:
    result = run("demo", *options, "--config", "fast", "--prompt", "white ring up")
    assert result.exit_code == 0, result.output
    for words in ("white ring up · fast", "384 tokens", "speed-up", "PSNR", "results.json"):
        assert words in result.stdout
    assert (tmp_path / "out" / "side_by_side.mp4").stat().st_size > 500


def test_json_and_redrawing(run_json: Callable[..., Any], options: list[object], tmp_path: Path) -> None:
    document = run_json("demo", *options)
    assert document["label"] == "balanced + min_tokens=0, pool=[4,4]"
    assert document["config"]["attention"]["min_tokens"] == 0
    out = tmp_path / "out"
    pictures = {name for name in document["files"] if name.endswith(".png")}
    assert len(pictures) == 6
    again = run_json("plot", out / "results.json", "--out", tmp_path / "again")
    assert {Path(f).name for f in again["files"]} == pictures
    assert all((tmp_path / "again" / name).stat().st_size > 500 for name in pictures)
    one = run_json("plot", out / "density.json", "--out", tmp_path / "one")
    assert [Path(f).name for f in one["files"]] == ["density.png"]


def test_plot_refuses_other_files(run: Callable[..., Any], tmp_path: Path) -> None:
    for text in ("{}", "[1]", '{"kind": "soup"}', "not json"):
        file = tmp_path / "x.json"
        file.write_text(text)
        result = run("plot", file)
        assert result.exit_code == 2 and result.stderr.startswith("vdit-fast: error: "), (text, result.output)
