"""``vdit-fast profile``: oracle, recall of a plan, character of heads, expected speed-up, verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vdit_fast.cli import probing
from vdit_fast.cli.mass import DENSITIES, Weights, best_blocks, label, sample_rows
from vdit_fast.cli.profiling import verdict
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners import Draft, Rettention

GRID = (4, 6, 6)


def _context(text: int = 0, text_first: bool = False, kv_len: torch.Tensor | None = None) -> LayerContext:
    return LayerContext(
        layer=0, num_layers=1, name="x", grid=GRID, n_video=144, text=text, text_first=text_first, kv_len=kv_len
    )


def _truth(q: torch.Tensor, k: torch.Tensor, valid: int) -> torch.Tensor:
    """fp64 attention weights [H, N, N] of the first item."""
    group = q.shape[2] // k.shape[2]
    keys = k[0].double().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q[0].double(), keys) * q.shape[-1] ** -0.5
    scores[..., valid:] = -torch.inf
    return scores.softmax(-1)


@pytest.mark.parametrize("text_first", [False, True])
def test_weights_of_sampled_rows(text_first: bool) -> None:
    torch.manual_seed(0)
    ctx = _context(text=5, text_first=text_first, kv_len=None if text_first else torch.tensor([147]))
    q, k = torch.randn(1, 149, 4, 8) * 2, torch.randn(1, 149, 2, 8)
    truth = _truth(q, k, 149 if text_first else 147)
    rows = sample_rows(ctx, 20, "cpu")
    assert len(rows) == 20 == len(rows.unique()) and all(r in range(149)[ctx.video_slice] for r in rows.tolist())
    assert torch.equal(sample_rows(ctx, 500, "cpu"), torch.arange(149)[ctx.video_slice])
    for head in range(4):
        weights = Weights.of(q, k, ctx, rows, batch=0, head=head)
        torch.testing.assert_close(weights.weight.double(), truth[head, rows], rtol=1e-5, atol=1e-7)
        best = weights.best((0.1, 0.5, 1.0))
        largest = truth[head, rows].flatten().sort(descending=True).values
        assert best[0] == pytest.approx(float(largest[:298].sum()) / 20, rel=1e-5) and best[2] == pytest.approx(1)
        plan = AttentionPlan.from_mask(torch.rand(4, 149, 149) < 0.3, block=(16, 16))
        density, mass = weights.kept(plan)
        mask = plan.to_mask()[0, head, rows]
        assert density == pytest.approx(float(mask.float().mean()))
        assert mass == pytest.approx(float((truth[head, rows] * mask).sum()) / 20, rel=1e-5)
        assert mass <= weights.best([density])[0] + 1e-9
        assert weights.text(ctx) == pytest.approx(float(truth[head, rows][:, ctx.text_slice].sum()) / 20, rel=1e-5)


def test_best_blocks() -> None:
    torch.manual_seed(0)
    ctx = _context()
    q, k = torch.randn(1, 144, 2, 8) * 2, torch.randn(1, 144, 2, 8)
    found = best_blocks(q, k, ctx, (0.25, 1.0), block=12, count=99)
    mass = _truth(q, k, 144).unflatten(2, (12, 12)).sum(-1).unflatten(1, (12, 12)).sum(2).flatten(1) / 12
    want = mass.sort(descending=True).values[:, :36].sum(1) / 12
    for head in range(2):
        assert found[0][head] == pytest.approx([float(want[head]), 1.0], rel=1e-4)
    everything = Weights.of(q, k, ctx, torch.arange(144), batch=0, head=0)
    assert found[0][0][0] < everything.best([0.25])[0]


@pytest.mark.parametrize(("axis", "word"), [(0, "spatial"), (1, "temporal"), (None, "global")])
def test_character(axis: int | None, word: str) -> None:
    """Keys of the own frame, or of the own place, get nearly all the weight; or none is preferred."""
    place = torch.arange(144)
    group = {0: place // 36, 1: place % 36, None: torch.zeros(144, dtype=torch.long)}[axis]
    q = torch.nn.functional.one_hot(group, 36).float()[None, :, None] * 8
    weights = Weights.of(q, q, _context(), torch.arange(144), batch=0, head=0)
    assert label(*weights.character(_context())) == word


def test_the_document(tiny_weights: Path, run_json: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    size = ["--frames", 6, "--height", 32, "--width", 32, "--steps", 4]
    arguments = ["profile", "--weights", tiny_weights, *size, "--out", tmp_path, "--method", "draft"]
    document = run_json(*arguments, "--set", "attention.dense_steps=2", "--set", "attention.pool=[4,4]")
    assert document["tokens"]["grid"] == [6, 8, 8] and document["steps"] == 4
    assert document["calls"] == 4 * 2 * 3 and document["sparse_calls"] == 12 and document["forwards"] == 8
    cost = document["cost"]
    a, s = cost["attention_share"], cost["sparse_share"]
    assert 0 < a < 1 and s == 0.5 and cost["limit"] == pytest.approx(1 / (1 - a))
    d, e, p = (cost[key] for key in ("density", "efficiency", "overhead"))
    assert cost["speedup"] == pytest.approx(1 / (1 - a + a * (1 - s + s * (d / e + p))))
    assert 0 < document["attention_seconds"] < document["forward_seconds"]
    assert len(document["heads"]) == 6 and len(document["looks"]) == 3 * 6
    for look in document["looks"]:
        assert look["best"] == sorted(look["best"]) and look["best"][-1] == pytest.approx(1, abs=1e-4)
        assert all(b <= o + 0.05 for b, o in zip(look["blocks"], look["best"], strict=True))  # other rows are sampled
        if look["step"] >= 2:
            assert 0 < look["recall"] <= look["reachable"] + 1e-6 <= 1 + 2e-6
        else:
            assert look["recall"] is None
    assert document["verdict"].startswith(("expect", "this will not help here"))
    names = {"recall.png", "character.png", "density_map.png", "recall_map.png", "plan.png"}
    assert set(document["files"]) == names | {"profile.json"}
    assert all((tmp_path / name).stat().st_size > 500 for name in names)
    again = run_json("plot", tmp_path / "profile.json", "--out", tmp_path / "again")
    assert {Path(f).name for f in again["files"]} == names - {"plan.png"}


def test_a_run_that_stays_dense(tiny_weights: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    size = ["--frames", 2, "--height", 32, "--width", 32, "--steps", 1]
    result = run("profile", "--weights", tiny_weights, *size, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "this will not help here" in result.stdout
    document = json.loads((tmp_path / "profile.json").read_text())
    assert any("min_tokens" in reason for reason in document["reasons"])  # maybe after the limit, which is measured


def _document(**cost: Any) -> dict[str, Any]:
    base = {"attention_share": 0.6, "limit": 2.5, "sparse_share": 0.7, "density": 0.3, "efficiency": 0.9}
    base |= {"overhead": 0.05, "sparse_step_speedup": 1.6, "speedup": 1.4}
    heads = [{"recall": 0.97, "reachable": 0.99}]
    rest = {
        "planner": {"method": "draft"},
        "tokens": {"video": 6144},
        "steps": 12,
        "sparse_calls": 9,
        "heads": heads,
        "corrected": False,
    }
    return {"cost": base | cost, "dense_reasons": {"6,144 tokens < min_tokens 9,000": 4}} | rest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "expect 1.40x with draft"),
        ({"attention_share": 0.1, "limit": 1.11, "speedup": 1.06}, "no method can give more than 1.11x"),
        ({"overhead": 0.9, "speedup": 0.9}, "a sparse call is slower than a dense one"),
        ({"sparse_share": 0.05, "speedup": 1.02}, "only 5% of the calls are sparse, in 12 steps"),
        ({"sparse_step_speedup": 1.03, "speedup": 1.02}, "6,144 tokens leave too little"),
    ],
)
def test_the_verdict(changes: dict[str, float], words: str) -> None:
    assert words in verdict(_document(**changes))[0]


def test_the_verdict_on_quality_and_dense_runs() -> None:
    assert "every call dense: 6,144 tokens < min_tokens" in verdict(_document() | {"sparse_calls": 0})[0]
    weak = _document() | {"heads": [{"recall": 0.7, "reachable": 0.95}]}
    assert "draft keeps 70% of the attention mass where 95% are possible" in verdict(weak)[0]
    flat = _document() | {"heads": [{"recall": 0.5, "reachable": 0.6}, {"recall": None, "reachable": None}]}
    assert "attention is spread out" in verdict(flat)[0]


@pytest.mark.parametrize("reachable", [0.3, 0.95])
def test_the_verdict_on_methods_that_correct_what_they_drop(reachable: float) -> None:
    """Little mass read says nothing of their quality."""
    low = _document() | {"heads": [{"recall": 0.05, "reachable": reachable}], "corrected": True}
    line, warnings = verdict(low)
    assert "expect 1.40x with draft" in line and not any(word in line for word in ("visible", "spread out", "better"))
    assert warnings == ["draft reads 5% of the attention mass and makes up for the rest: judge it by its clips"]
    assert verdict(low | {"heads": [{"recall": 0.95, "reachable": 0.97}]})[1] == []


def test_the_timed_call_is_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row scale and a residual take part in what is timed against dense attention, and mark the method."""
    torch.manual_seed(0)
    calls: list[dict[str, Any]] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs | {"plan": args[3] if len(args) > 3 else kwargs.get("plan")})
        return probing_attention(*args, **kwargs)

    probing_attention = probing.attention
    monkeypatch.setattr(probing, "attention", attention)
    inner = Rettention(window=0.5, dense_steps=0, interval=5)
    probe = probing.Probe(inner=inner, rows=8, block=36)
    state: dict[Any, Any] = {}
    for step in range(5):
        q, k, v = torch.randn(3, 1, 144, 2, 8).unbind()
        ctx = replace(_context(), state=state, step=StepContext(step=step, num_steps=5))
        observe = probe.decision(q, k, v, ctx).observe
        if observe is not None:
            observe(*probing_attention(q, k, v, return_lse=True))
    assert probe.notes.corrected and len(probe.notes.timings) == 3
    sparse = [call for call in calls if call["plan"] is not None]
    assert sparse and all(call["row_scale"] is not None for call in sparse)
    assert all(call.get("row_scale") is None for call in calls if call["plan"] is None)
    plain = probing.Probe(inner=Draft(pool=(3, 3)), rows=8, block=36)
    plain.decision(q, k, v, replace(_context(), step=StepContext(step=3, num_steps=5)))
    assert not plain.notes.corrected and plain.notes.timings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere", "--prompt", "x"], "'nowhere' is not a folder"),
        (["--model", "."], "prompt: --model needs one"),
        (["--method", "drift"], "'drift'"),
        (["--config", "exact"], "is dense"),
    ],
)
def test_bad_input(arguments: list[str], words: str, run: Callable[..., Any]) -> None:
    result = run("profile", *arguments)
    assert result.exit_code == 2 and words in result.stderr, result.output


def test_densities_are_in_order() -> None:
    assert list(DENSITIES) == sorted(DENSITIES) and DENSITIES[-1] == 1
