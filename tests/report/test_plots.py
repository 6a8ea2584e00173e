"""Every picture is written with its JSON, and the JSON alone draws it again."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast import report
from vdit_fast.plan import AttentionPlan

pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

X = [0.05, 0.1, 0.25, 0.5, 1.0]
POINTS = [
    {"label": "dense", "speedup": 1.0, "psnr": math.inf, "group": "baseline"},
    {"label": "balanced", "speedup": 1.6, "psnr": 33.0, "group": "preset"},
    {"label": "fast", "speedup": 2.1, "psnr": 27.0, "group": "preset"},
]
STEPS = [
    {"mode": "dense", "seconds": 2.0},
    {"mode": "sparse", "seconds": 1.0, "plan_seconds": 0.1},
    {"mode": "odd", "seconds": 0.5},
]
PLOTS = {
    "plan_heatmap": lambda path: report.plan_heatmap(
        AttentionPlan.windows3d((4, 6, 6), (3, 3, 3), tile=(2, 3, 3), text=5), path, grid=(4, 6, 6), text=5
    ),
    "density_heatmap": lambda path: report.density_heatmap(torch.rand(12, 30), path, columns="head"),
    "recall_curve": lambda path: report.recall_curve(
        {"oracle": {"density": X, "recall": [x**0.2 for x in X]}, "draft": {"density": X[::-1], "recall": X[::-1]}},
        path,
    ),
    "pareto": lambda path: report.pareto(POINTS, path),
    "step_timeline": lambda path: report.step_timeline(STEPS, path),
    "per_frame_psnr": lambda path: report.per_frame_psnr(
        {"a": [math.inf, 30.0, 31.0], "b": torch.tensor([28.0, 27.0])}, path
    ),
    "speed_curve": lambda path: report.speed_curve(
        {
            "D=64": {
                "density": X,
                "speedup": [1 / x for x in X],
                "low": [0.9 / x for x in X],
                "high": [1.1 / x for x in X],
            }
        },
        path,
    ),
}


def check_picture(path) -> None:
    with image_module.open(path) as picture:
        width, height = picture.size
        assert 700 < width < 2500 and 400 < height < 2000
        assert picture.convert("RGB").getcolors(64) is None  # more than a blank page
        assert picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)  # legible on dark pages too


@pytest.mark.parametrize("kind", PLOTS)
def test_picture_and_json(kind, tmp_path):
    path = PLOTS[kind](tmp_path / "sub" / kind)
    assert path == tmp_path / "sub" / f"{kind}.png"
    check_picture(path)
    saved = report.read_json(path.with_suffix(".json"))
    assert saved["plot"] == kind and saved["environment"]["torch"] == torch.__version__
    again = report.replot(path.with_suffix(".json"), tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes()
    assert report.read_json(tmp_path / "again.json")["data"] == saved["data"]


def test_plan_without_order_has_one_panel_and_the_exact_density(tmp_path):
    plan = AttentionPlan.from_block_mask(torch.rand(2, 8, 8) < 0.5, 10, 10)
    data = report.read_json(report.plan_heatmap(plan, tmp_path / "p.png", head=1).with_suffix(".json"))["data"]
    assert [panel["order"] for panel in data["panels"]] == ["original"]
    assert torch.equal(torch.tensor(data["panels"][0]["permille"]), plan.to_mask()[0, 1].int() * 1000)


def test_contact_sheet(tmp_path):
    clips = {"a red ball " * 20: torch.rand(9, 3, 16, 24), "grey": torch.rand(2, 1, 12, 12)}
    path = report.contact_sheet(clips, tmp_path / "sheet", frames=4, scale=2, title="Two prompts")
    check_picture(path)
    saved = report.read_json(path.with_suffix(".json"))["data"]["clips"]
    assert [row["frames"] for row in saved] == [[0, 3, 5, 8], [0, 1]]
    with pytest.raises(ValueError, match="not their pixels"):
        report.replot(path.with_suffix(".json"))


def test_density_with_gaps_and_numbers(tmp_path):
    check_picture(report.density_heatmap([[1.0, None], [0.25, math.nan]], tmp_path / "d", columns="step"))


def test_svg(tmp_path):
    path = report.pareto(POINTS[:1], tmp_path / "one.svg")
    assert path.suffix == ".svg" and "<svg" in path.read_text() and (tmp_path / "one.json").is_file()


def test_error_metric_prefers_small_values(tmp_path):
    points = [{"label": "a", "speedup": 2.0, "relative_l2": 0.1}, {"label": "b", "speedup": 1.0, "relative_l2": 0.0}]
    check_picture(report.pareto(points, tmp_path / "l2", metric="relative_l2"))


def test_bad_input_is_named(tmp_path):
    path = tmp_path / "x"
    plan = AttentionPlan.dense(32)
    for call, words in [
        (lambda: report.plan_heatmap(plan, path, head=3), "head 3"),
        (lambda: report.plan_heatmap(plan, path, grid=(2, 3, 4)), "make 24 tokens, the plan has 32"),
        (lambda: report.plan_heatmap(AttentionPlan.dense(8, 16), path, grid=(2, 2, 2)), "self-attention"),
        (lambda: report.density_heatmap([], path), "density"),
        (lambda: report.density_heatmap([[0.1], [0.2, 0.3]], path), "density"),
        (lambda: report.density_heatmap([[1.5]], path), "outside"),
        (lambda: report.recall_curve({}, path), "curves is empty"),
        (lambda: report.recall_curve({"a": {"density": [0.5]}}, path), "lacks 'recall'"),
        (lambda: report.recall_curve({"a": {"density": [0.5], "recall": [1, 2]}}, path), "different lengths"),
        (lambda: report.speed_curve({"a": {"density": [50], "speedup": [2]}}, path), "leaves"),
        (lambda: report.speed_curve({"a": {"density": [0.5], "speedup": [0]}}, path), "above 0"),
        (lambda: report.pareto([], path), "points is empty"),
        (lambda: report.pareto([{"label": "a", "speedup": 1}], path), "lacks 'psnr'"),
        (lambda: report.pareto([{"label": "a", "speedup": math.inf, "psnr": 1}], path), "finite"),
        (lambda: report.pareto(POINTS, path, metric="fvd"), "metric is 'fvd'"),
        (lambda: report.step_timeline([], path), "steps is empty"),
        (lambda: report.step_timeline([{"mode": "dense"}], path), "lacks 'seconds'"),
        (lambda: report.step_timeline([{"mode": "a", "seconds": 1, "plan_seconds": 2}], path), "plan_seconds <="),
        (lambda: report.per_frame_psnr({"a": []}, path), "empty"),
        (lambda: report.per_frame_psnr({"a": ["high"]}, path), "not a list of numbers"),
        (lambda: report.contact_sheet({}, path), "0 entries"),
        (lambda: report.pareto(POINTS, tmp_path / "x.gif"), "x.gif"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_bad_json_is_named(tmp_path):
    broken, other, damaged = (tmp_path / name for name in ("broken.json", "other.json", "damaged.json"))
    broken.write_text("{")
    report.write_json(other, {"speed": 1})
    report.write_json(damaged, {"plot": "pareto", "data": {"dots": []}})
    for path, words in ((broken, "not a JSON file"), (other, "not a plot's JSON"), (damaged, "damaged pareto")):
        with pytest.raises(ValueError, match=words):
            report.replot(path)


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"vdit-fast\[plots\]"):
        report.step_timeline(STEPS, tmp_path / "x")


def test_crowded_labels_stay_apart(tmp_path: Path) -> None:
    """Thirteen points within a few pixels of each other: no two names may overlap."""
    from matplotlib.text import Text

    from vdit_fast.report import curves

    points = [{"label": f"method {i}", "speedup": 1.5 + 0.004 * i, "psnr": 30 + 0.05 * (i % 3)} for i in range(13)]
    points += [{"label": "far", "speedup": 3, "psnr": 40}]
    seen: list[Any] = []
    place = curves._place_labels

    def watch(axes: Any, labels: Any) -> None:
        place(axes, labels)
        renderer = axes.figure.canvas.get_renderer()
        notes = [text for text in axes.texts if text.get_text()]
        for note in notes:
            note.update_positions(renderer)
            seen.append(Text.get_window_extent(note, renderer))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_place_labels", watch)
        report.pareto(points, tmp_path / "crowd.png")
    assert len(seen) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(seen) for b in seen[:i])


def test_marks_of_the_dense_model_and_words_of_a_map(tmp_path: Path) -> None:
    steps = [{"mode": "search", "seconds": 1.0, "dense_seconds": 2.0}, {"mode": "forecast", "seconds": 0.1}]
    path = report.step_timeline(steps, tmp_path / "t.svg")
    saved = json.loads(path.with_suffix(".json").read_text())["data"]["steps"]
    assert saved[0]["dense_seconds"] == 2.0 and "dense_seconds" not in saved[1]
    check_picture(report.replot(path.with_suffix(".json")))
    path = report.density_heatmap([[0.1, 0.2]], tmp_path / "h.png", label="mass kept")
    assert json.loads(path.with_suffix(".json").read_text())["data"]["label"] == "mass kept"
