"""``vdit-fast tune`` on a tiny random model, and the file it writes in the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vdit_fast.config import Config

pytest.importorskip("diffusers")
pytest.importorskip("yaml")

SMALL = ["--frames", 6, "--steps", 2]


@pytest.fixture
def options(tiny_weights: Path, tmp_path: Path) -> list[object]:
    size = ["--weights", tiny_weights, "--height", 32, "--width", 32, *SMALL]
    return [*size, "--out", tmp_path / "new" / "tuned.yaml", "--set", "attention.block=32", "--cost", "pairs"]


def test_the_written_file_drives_the_demo(run_json: Callable[..., Any], options: list[object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("av")
    prompts = ["--prompt", "white ring up", "--prompt", "red circle left"]
    document = run_json("tune", *options, *prompts, "--max-loss", 2, "--groups", 1)
    config = Config.from_file(document["file"])
    assert config.attention.to_dict() == document["config"] and document["config"]["record"]["runs"] == 2
    assert document["config"]["made_for"] == {
        "family": "wan", "layers": 3, "heads": 2, "grid": [6, 8, 8], "text": 0, "steps": 2
    }  # fmt: skip
    assert document["density"] < 1 and set(document["errors"]) == {"0"}
    size = ["--frames", 6, "--size", 32, "--repeats", 1, "--weights", options[1], "--out", tmp_path / "demo"]
    shown = run_json("demo", "--config", document["file"], "--steps", 2, *size)
    assert shown["density"]["overall"] == pytest.approx(document["density"], abs=0.01)
    refused = run_json("demo", "--config", document["file"], "--steps", 3, *size, code=2)
    assert "steps 2 (here 3)" in refused["error"]


def test_the_table_is_shown(run: Callable[..., Any], options: list[object]) -> None:
    result = run("tune", *options, "--modes", "skip, diagonal", "--max-loss", 2)
    assert result.exit_code == 0, result.output
    for words in ("multi_diagonal", "vertical"):
        assert words not in result.stdout
    for words in ("skip", "diagonal", "layer", "step", "density", "tuned.yaml", "accelerate(pipe, "):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "tuned.txt"), "use .yaml or .json"),
        (("--prompt", "red blob right"), "unknown word 'blob'"),
        (("--set", "attention=null"), "override its knobs only"),
        (("--set", "attention.sparsety=0.5"), "did you mean 'sparsity'"),
        (("--modes", "skip,band"), "modes must be different ones of"),
        (("--cost", "money"), '"time" or "pairs"'),
        (("--model", "nowhere", "--prompt", "x"), "'nowhere' is not a folder"),
        (("--model", "nowhere"), "at least one --prompt"),
    ],
)
def test_bad_input_is_one_line(run: Callable[..., Any], arguments: tuple[str, ...], words: str) -> None:
    result = run("tune", *arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output
