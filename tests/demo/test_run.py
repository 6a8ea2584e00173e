"""The whole demo on a tiny random model: files, numbers, and that nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast.config import Config
from vdit_fast.demo import run as demo_run
from vdit_fast.demo.numbers import density_summary, step_rows
from vdit_fast.demo.recorder import PlannedCall
from vdit_fast.demo.run import run_demo
from vdit_fast.planners import REGISTRY

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("av")

SIZE = {"frames": 6, "height": 32, "width": 32}  # 6 x 8 x 8 = 384 tokens
SPARSE = {"attention": {"method": "draft", "sparsity": 0.5, "dense_steps": 1, "dense_layers": 1, "pool": [4, 4]}}
PICTURES = {"plan.png", "density.png", "density_steps.png", "psnr.png", "steps.png", "contact_sheet.png"}
FILES = {"dense.mkv", "fast.mkv", "side_by_side.mp4", "results.json"}


@pytest.fixture
def demo(tiny: torch.nn.Module, tmp_path: Path) -> Any:
    def call(config: Any = None, **options: Any) -> dict[str, Any]:
        chosen = Config.from_dict(SPARSE) if config is None else config
        given = {"steps": 3, "repeats": 2, "out": tmp_path / "out", "model": tiny} | SIZE | options
        return run_demo("red circle right", chosen, **given)

    return call


def test_everything_is_written_and_adds_up(demo: Any, tiny: torch.nn.Module, tmp_path: Path) -> None:
    from vdit_fast.report import compare_clips, read_video

    before = [block.attn1.processor for block in tiny.blocks]
    seen: list[tuple[int, int, str]] = []
    results = demo(label="half", progress=lambda *a: seen.append(a))
    assert [block.attn1.processor for block in tiny.blocks] == before and not tiny._forward_pre_hooks

    out = tmp_path / "out"
    assert set(results["files"]) == PICTURES | FILES
    for name in results["files"]:
        assert (out / name).stat().st_size > 500, name
    film = read_video(out / "side_by_side.mp4")
    assert film.shape[0] == 6 and film.shape[3] > 2 * 4 * 32 and film.shape[2] > 4 * 32
    from_files = compare_clips(read_video(out / "fast.mkv"), read_video(out / "dense.mkv"))
    assert from_files.psnr == pytest.approx(float(results["quality"]["psnr"]), abs=1.0)  # up to rounding to 8 bits
    stored = json.loads((out / "results.json").read_text(), parse_constant=lambda t: pytest.fail(t))
    assert stored["kind"] == "vdit_fast.demo" and stored["label"] == "half"
    assert stored["config"]["attention"]["sparsity"] == 0.5 and "torch" in json.dumps(stored["environment"])

    assert stored["settings"]["tokens"] == 384 and stored["settings"]["token_grid"] == [6, 8, 8]
    assert [s["mode"] for s in stored["steps"]] == ["dense", "sparse", "sparse"]
    density = stored["density"]
    assert density["sparse_calls"] < 0.7
    assert density["sparse_steps"] == pytest.approx((1 + 2 * density["sparse_calls"]) / 3, abs=1e-5)
    assert density["overall"] == pytest.approx((1 + 2 * density["sparse_steps"]) / 3, abs=1e-5)
    assert len(density["layer_head"]) == 3 and density["layer_head"][0] == [1.0, 1.0]
    assert [row[0] for row in density["layer_step"]] == [1.0, 1.0, 1.0] and density["layer_step"][1][1] < 0.7

    speed = stored["speed"]
    assert len(speed["dense_seconds"]["all"]) == len(speed["fast_seconds"]["all"]) == 2
    assert speed["speedup"]["median"] == pytest.approx(
        speed["dense_seconds"]["median"] / speed["fast_seconds"]["median"]
    )
    assert "attention draft" in stored["report"]["text"] and "recorder" not in REGISTRY and "" not in REGISTRY
    quality = stored["quality"]
    assert 10 < float(quality["psnr"]) < 200 and len(stored["per_frame_psnr"]) == 6
    assert len(stored["latent_relative_l2"]) == 3
    assert stored["latent_relative_l2"][0] < 1e-4 < stored["latent_relative_l2"][2]  # the first step is dense
    assert seen[-1][:2] == (2 * (1 + 3 * 2), 2 * (1 + 3 * 2)) and [d for d, *_ in seen] == list(range(1, 15))


def test_dense_configs_have_no_plan(demo: Any) -> None:
    results = demo("exact", repeats=1)
    assert set(results["files"]) == PICTURES - {"plan.png"} | FILES
    assert results["label"] == "exact" and results["density"]["overall"] == 1.0
    assert results["latent_relative_l2"][-1] < 1e-4 and {s["mode"] for s in results["steps"]} == {"dense"}


def test_a_search_is_a_step_of_its_own(demo: Any) -> None:
    """Its cost is planning, although it happens after a dense call."""
    adaspa = {"method": "adaspa", "dense_steps": 1, "search": [0.34], "block": 32, "sparsity": 0.5}
    results = demo(Config.from_dict({"attention": adaspa}), repeats=1)
    assert [step["mode"] for step in results["steps"]] == ["dense", "search", "sparse"]
    searching, reading = (results["steps"][i]["plan_seconds"] for i in (1, 2))
    assert 0 < searching < results["steps"][1]["seconds"] and 0 < reading < results["steps"][2]["seconds"]
    assert [row[1] for row in results["density"]["layer_step"]] == [1.0] * 3
    assert results["density"]["layer_step"][0][2] < 0.7


def test_notes_tell_what_spoils_the_numbers() -> None:
    def document(mode: str, seconds: list[float]) -> dict[str, Any]:
        row = {"min": min(seconds), "max": max(seconds), "all": seconds}
        return {
            "config": {"attention": {}},
            "steps": [{"mode": mode}],
            "report": {"layers": [{"dense": {"too small": 4}, "unasked": {}, "fallbacks": {"odd": 1}}] * 2},
            "speed": {"dense_seconds": row, "fast_seconds": row | {"max": row["min"]}},
        }

    assert demo_run.notes(document("sparse", [1.0, 1.1])) == []
    (alone,) = demo_run.notes(document("sparse", [1.0]))
    assert "--repeats" in alone
    (busy,) = demo_run.notes(document("sparse", [1.0, 1.3]))
    assert "the dense runs took 1.0 to 1.3 s" in busy
    (dense,) = demo_run.notes(document("dense", [1.0, 1.0]))
    assert "8 x too small; 2 x odd" in dense
    assert demo_run.notes(document("dense", [1.0, 1.0]) | {"config": {"attention": None}}) == []


def test_the_handle_is_removed_after_an_error(demo: Any, tiny: torch.nn.Module, monkeypatch: Any) -> None:
    before = [block.attn1.processor for block in tiny.blocks]
    monkeypatch.setattr(demo_run.DemoPipeline, "_predict", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo()
    assert [block.attn1.processor for block in tiny.blocks] == before


@pytest.mark.parametrize(("options", "words"), [({"repeats": 0}, "repeats: 0"), ({"steps": 0}, "steps: 0")])
def test_bad_numbers_are_named_before_any_work(demo: Any, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        demo(**options)
    with pytest.raises(ValueError, match="preset"):
        demo("blanced")
    assert not (tmp_path / "out").exists()


def test_density_averages_count_unplanned_calls_as_dense() -> None:
    calls = [PlannedCall(step=1, branch=b, layer=1, density=[0.25, 0.75], seconds=0.0) for b in (0, 1)]
    found = density_summary(calls, [], steps=2, branches=2, layers=2, heads=2)
    assert found["sparse_calls"] == pytest.approx(0.5)
    assert found["sparse_steps"] == pytest.approx(0.75)
    assert found["overall"] == pytest.approx(0.875)
    assert found["layer_head"] == [[1.0, 1.0], [0.25, 0.75]]
    assert found["layer_step"] == [[1.0, 1.0], [1.0, 0.5]]


def test_forecast_steps_read_nothing() -> None:
    calls = [PlannedCall(step=1, branch=0, layer=0, density=[0.5], seconds=0.0)]
    found = density_summary(calls, [2, 3], steps=4, branches=1, layers=1, heads=1)
    assert found["layer_step"] == [[1.0, 0.5, 0.0, 0.0]]
    assert (found["overall"], found["sparse_steps"], found["sparse_calls"]) == pytest.approx((0.375, 0.5, 0.5))


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_one_slow_run_plans_no_longer_than_its_steps(slow: int, tmp_path: Path) -> None:
    """Planning and steps are medians over the same runs: a slow run, the last one included, contradicts nothing."""
    from types import SimpleNamespace

    from vdit_fast.report import step_timeline

    times = [30.0 if turn == slow else 1.0 for turn in range(3)]
    runs = [[PlannedCall(1, 0, layer, [0.5], 0.3 * t) for layer in range(3)] for t in times]
    drawn: Any = [SimpleNamespace(sigmas=[1.0, 0.5], step_seconds=[t, t]) for t in times]
    rows = step_rows(runs, [], drawn, drawn)
    assert [row["mode"] for row in rows] == ["dense", "sparse"]
    assert [row["plan_seconds"] for row in rows] == [0, pytest.approx(0.9)] and rows[1]["seconds"] == 1.0
    assert step_timeline(rows, tmp_path / "steps.png").exists()
    assert step_rows([], [], drawn, drawn)[1]["plan_seconds"] == 0
