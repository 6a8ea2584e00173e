"""``vdit-fast bench methods`` on a tiny random model, the search of knobs, and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vdit_fast.cli import methods_bench
from vdit_fast.cli.matching import METHODS, Match, Method, match, method, planner_name
from vdit_fast.cli.methods_bench import Settings, run_methods
from vdit_fast.cli.methods_report import verdict
from vdit_fast.planners import REGISTRY

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


@pytest.fixture
def options(tiny_weights: Path, tmp_path: Path) -> list[object]:
    return ["bench", "methods", "--quick", "--weights", tiny_weights, "--frames", 6, "--size", 32, "--out", tmp_path]


def test_two_methods_at_one_density(run_json: Callable[..., Any], options: list[object], tmp_path: Path) -> None:
    document = run_json(*options, "--method", "draft", "--method", "window", "--density", 0.35)
    assert document["kind"] == "vdit_fast.bench.methods" and document["left_out"] == {}
    rows = {row["method"]: row for row in document["methods"]}
    assert set(rows) == {"draft", "window"}
    for row in rows.values():
        density = row["density"]
        assert row["matched"] == (abs(density["sparse_calls"] - 0.35) <= 0.05)
        assert density["overall"] == pytest.approx((1 + 3 * density["sparse_calls"]) / 4, abs=1e-4)  # 1 of 4 dense
        assert row["config"][row["knob"]] == row["value"]
        assert 0 < row["recall"] <= row["best_recall"] <= 1 and row["planned_calls"] == 3 * 2 * 3
        assert 0 < row["output_error"] < 1
        assert 10 < row["psnr"] < 100 and 0 < row["latent_relative_l2"] < 1
        assert row["per_prompt"][0]["psnr"] == row["psnr"]
        assert row["overhead"] > 0 and row["plan_seconds"] > 0
        assert [step["mode"] for step in row["steps"]] == ["dense", *["sparse"] * 3]
        stock = document["baselines"]["stock"]["seconds"]["median"]
        assert row["speedup"]["median"] == pytest.approx(stock / row["seconds"]["median"])
    assert rows["draft"]["matched"]
    assert float(document["baselines"]["dense"]["psnr"]) > 60
    names = {f"{what}_{name}.png" for what in ("plan", "density", "steps") for name in rows} | {"pareto.png"}
    assert set(document["files"]) == names | {"methods.md", "methods.json"}
    assert all((tmp_path / name).stat().st_size > 300 for name in document["files"])
    assert "svg2" in document["verdict"] and document["verdict"] in (tmp_path / "methods.md").read_text()
    assert json.loads((tmp_path / "methods.json").read_text())["methods"] == document["methods"]
    again = run_json("plot", tmp_path / "methods.json", "--out", tmp_path / "again")
    assert {Path(f).name for f in again["files"]} == {n for n in names if not n.startswith("plan_")}


def test_the_table_is_shown(run: Callable[..., Any], options: list[object]) -> None:
    result = run(*options, "--method", "window", "--prompt", "white ring up", "--prompt", "red circle left")
    assert result.exit_code == 0, result.output
    for words in ("own dense", "window", "2 rounds", "planning", "written to"):
        assert words in result.stdout


def test_every_planner_has_a_knob() -> None:
    """Add a line to METHODS for a planner whose density hangs on neither `sparsity` nor `top_p`."""
    names = [name for name, cls in REGISTRY.items() if cls.__module__.startswith("vdit_fast.")]
    assert [name for name in names if method(name) is None] == []
    assert {planner_name(name) for name in METHODS} <= set(names)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("target", [0.05, 0.3, 0.31, 0.97])
def test_the_search_finds_the_knob(rising: bool, target: float) -> None:
    asked: list[float] = []

    def density(value: float) -> float:
        asked.append(value)
        return value**2 if rising else (1 - value) ** 2

    found = match(Method("x", low=0.0, high=1.0), density, target, 12)
    assert found.density == pytest.approx(target, abs=0.01) and found.density == density(found.value)
    assert len(asked) <= 13


def test_the_search_knows_choices_and_dense_methods() -> None:
    table = {"a": 0.1, "b": 0.28, "c": None}
    assert match(Method("x", choices=("a", "b", "c")), table.get, 0.3, 2) == Match("b", 0.28)
    nothing = match(Method("x"), lambda value: None, 0.3, 5)
    assert nothing.density is None
    steps = match(Method("x", low=0, high=8), lambda value: 0.2 * math.ceil(value / 2), 0.35, 9)
    assert steps.density == pytest.approx(0.4)


def test_methods_that_search_get_no_dense_step_more_than_the_others() -> None:
    """The search is the last of the shared dense steps, so there must be one."""
    with pytest.raises(ValueError, match="at least 1 is needed"):
        run_methods(Settings(steps=2, dense_steps=0), names=["adaspa"])
    methods = methods_bench._methods(None, {})
    for steps in (1, 3):
        bench = SimpleNamespace(settings=Settings(steps=12, dense_steps=steps))
        for name, line in methods.items():
            planner = methods_bench._Bench.planner(bench, name, line, 0.5)  # type: ignore[arg-type]
            assert planner.dense_steps + line.searches == steps, name


def _row(name: str, psnr: float, speedup: float, **more: Any) -> dict[str, Any]:
    density = {"sparse_calls": 0.3, "overall": 0.475}
    row = {"method": name, "psnr": psnr, "speedup": {"median": speedup}, "density": density, "matched": True}
    return row | {"recall": 0.9, "corrected": False, "overhead": 0.1} | more


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["nothing is known"]),
        ([_row("svg2", 30, 2.0)], ["svg2 is the best", "alone"]),
        ([_row("svg2", 31, 2.0), _row("draft", 30, 2.2)], ["svg2 is the best", "next is draft with 30.0 dB"]),
        ([_row("svg2", 30.9, 2.0), _row("draft", 31, 1.8)], ["svg2 is the best"]),  # equal, and faster
        ([_row("svg2", 31, 1.8), _row("draft", 31, 2.0)], ["svg2 is not the best", "equally good and faster"]),
        ([_row("svg2", 30, 2, recall=0.8), _row("draft", 32, 2)], ["not the best", "90.0% of the attention mass"]),
        ([_row("svg2", 30, 2), _row("ret", 32, 2, recall=0.5, corrected=True)], ["makes up for what it leaves out"]),
        (
            [_row("svg2", 30, 2, output_error=0.185), _row("svg1", 32, 2, recall=0.6, output_error=0.134)],
            ["not by the mass it reads", "errs by 13.4% against 18.5%: what it leaves out resembles what it reads"],
        ),
        (
            [_row("svg2", 30, 2, output_error=0.1), _row("svg1", 32, 2, recall=0.95, output_error=0.05)],
            ["95.0% of the attention mass against 90.0%", "output errs by 5.0% against 10.0%"],
        ),
        ([_row("svg2", 30, 2), _row("x", 40, 2, matched=False)], ["svg2 is the best", "not matched: x"]),
        ([_row("draft", 30, 2)], ["draft is the best", "svg2 was not measured"]),
    ],
)
def test_the_verdict(rows: list[dict[str, Any]], words: list[str]) -> None:
    text = verdict({"methods": rows})
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "drift"], "'drift' is unknown"),
        (["--density", "1.5"], "density: 1.5"),
        (["--dense-steps", "4"], "dense-steps: 4"),
        (["--prompt", "red blob up"], "unknown word 'blob'"),
        (["--dense-steps", "0"], "dense-steps: 0; adaspa, rettention search in a dense step"),
        (["--dense-steps", "0", "--method", "draft", "--method", "rettention"], "dense-steps: 0; rettention search"),
    ],
)
def test_bad_input(arguments: list[str], words: str, run: Callable[..., Any], options: list[object]) -> None:
    result = run(*options, *arguments)
    assert result.exit_code == 2 and words in result.stderr, result.output
