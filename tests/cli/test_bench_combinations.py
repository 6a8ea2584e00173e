"""``vdit-fast bench combinations`` on a tiny random model, and its verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast.cli.combinations import COMBINATIONS
from vdit_fast.cli.combinations_report import verdict
from vdit_fast.cli.peak_memory import PeakMemory
from vdit_fast.config import Config

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


@pytest.fixture
def options(tiny_weights: Path, tmp_path: Path) -> list[object]:
    size = ["--frames", 6, "--size", 32, "--steps", 4, "--repeats", 1]
    return ["bench", "combinations", *size, "--no-compiled", "--weights", tiny_weights, "--out", tmp_path]


def test_every_combination_is_a_configuration() -> None:
    for group, mapping in COMBINATIONS.values():
        assert group in ("kernels", "sparse", "cache", "subset", "linear", "combined")
        assert Config.from_dict(Config.from_dict(mapping).to_dict()) == Config.from_dict(mapping)


def test_alone_and_together(run_json: Callable[..., Any], options: list[object], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"cache": {"method": "taylorseer", "first_full": 1, "interval": 4}}))
    only = [part for name in ("dense kernel", "draft", "draft + taylorseer /3") for part in ("--only", name)]
    document = run_json(*options, *only, "--config", f"mine={tmp_path / 'mine.json'}")
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["stock", "dense kernel", "draft", "draft + taylorseer /3", "mine"]
    assert rows["dense kernel"]["psnr"] > 60 and rows["dense kernel"]["attention"] == 1
    assert rows["draft"]["attention"] < 1 and rows["draft"]["cache"] is None
    assert rows["mine"]["attention"] == pytest.approx(0.5)  # the first step and the last one of four
    assert rows["draft + taylorseer /3"]["attention"] < rows["draft"]["attention"]
    for name, row in rows.items():
        assert row["dense_equivalent_gflops"] > 0 and row["peak_bytes"] >= 0
        assert (name == "stock") == (row["group"] == "baseline") == ("psnr" not in row)
    assert set(document["files"]) == {"combinations.json", "combinations.md", "combinations.png"}
    assert document["verdict"] in (tmp_path / "combinations.md").read_text()
    again = run_json("plot", tmp_path / "combinations.json", "--out", tmp_path / "again")
    assert [Path(file).name for file in again["files"]] == ["combinations.png"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (["--only", "svg9"], "svg9"),
        (["--config", "mine"], "NAME=FILE"),
        (["--prompt", "a cat"], "unknown word 'cat'"),
    ],
)
def test_bad_input(run: Callable[..., Any], options: list[object], bad: list[str], words: str) -> None:
    result = run(*options, *bad)
    assert result.exit_code == 2 and words in result.output + (result.stderr or "")


def row(name: str, speed: float, psnr: float, group: str = "combined") -> dict[str, Any]:
    return {"name": name, "group": group, "speedup": {"median": speed}, "psnr": psnr}


def test_verdict() -> None:
    document: dict[str, Any] = {"settings": {"goal": 4.0, "floor": 25.0}, "rows": [{"group": "baseline"}]}
    document["rows"] += [row("a", 2.0, 40.0), row("b", 4.5, 24.0), row("c", 3.0, 26.0)]
    assert "missed" in verdict(document) and "c: 3.00x" in verdict(document)
    assert "quality limits it: b has 4.50x but 24.0 dB" in verdict(document)
    document["rows"] += [row("d", 4.1, 25.5)]
    assert verdict(document) == "the goal of 4x at 25 dB is reached: d: 4.10x over stock at 25.5 dB"
    document["rows"] = [row("e", 9.0, 3.0)]
    assert verdict(document) == "no configuration keeps 25 dB"


def test_peak_memory_sees_what_comes_and_goes() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        big = torch.ones(32 << 20)
        del big
    if memory.nbytes is None:
        pytest.skip("this system does not tell the resident set")
    assert memory.nbytes > 100 << 20
