"""examples/causal: a few steps of the fine-tuning, and clips streamed with what comes out of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vdit_fast.demo.model import CAUSAL_WEIGHTS, demo_metadata, load_demo_model

pytest.importorskip("diffusers")
FOLDER = Path(__file__).parents[2] / "examples" / "causal"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"causal_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "data", raising=False)  # the example's own, by a common name
    return module


def test_training_and_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, rollout = script("train", monkeypatch), script("rollout", monkeypatch)
    monkeypatch.setattr(train, "SIZES", ((1, 6, 16),))
    monkeypatch.setattr(train, "HELD_OUT_CLIPS", 1)
    train.main(["--steps", "3", "--out", str(tmp_path)])
    weights = tmp_path / "weights.safetensors"
    facts = json.loads(demo_metadata(weights)["causal_training"])
    assert facts["steps"] == 3 and all(facts[when][what] > 0 for when in ("before", "after") for what in facts[when])
    before, after = (load_demo_model(path=path).blocks[0].attn1.to_q.weight for path in (None, weights))
    assert 0 < float((before - after).abs().max()) < 0.1
    monkeypatch.setattr(rollout, "PROMPTS", ("red circle right",))
    monkeypatch.setattr(rollout, "STEPS", (1000, 500))
    rollout.main(["--weights", str(weights), "--frames", "6", "--side", "16", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "rollout.json").read_text())["models"]
    assert set(found) == {"clips of the training's kind", "trained on whole clips", "causal"}
    assert all(row["median"]["border_over_inside"] > 0 for row in found.values())


def test_the_loss_is_that_of_the_noisy_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that returns its input: the clean copy costs nothing, the noisy one its noise, weighted."""
    train = script("train", monkeypatch)
    model = load_demo_model()
    x0, sigma = torch.rand(2, 3, 6, 16, 16), torch.tensor([[0.2] * 3 + [0.9] * 3]).expand(2, -1)
    monkeypatch.setattr(type(model), "forward", lambda self, hidden_states, timestep, **_: (hidden_states,))
    with train.accelerate(model) as handle:
        loss = train.causal_loss(handle, x0, torch.zeros(2, 4, 16), sigma, torch.zeros(2, 1))
    assert loss.shape == (2, 6)
    want = sigma.square() * (1 + x0.square().mean((1, 3, 4))) / (sigma.square() + 0.05)
    torch.testing.assert_close(loss, want, rtol=0.25, atol=0)  # the mean over 768 random numbers


def test_packaged_weights_continue_clean_frames_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """On clips that training has not seen; a first chunk is about as hard for both."""
    train = script("train", monkeypatch)
    monkeypatch.setattr(train, "HELD_OUT_CLIPS", 2)
    facts = json.loads(demo_metadata(CAUSAL_WEIGHTS)["causal_training"])
    assert (facts["steps"], facts["chunk"], facts["held"]) == (1200, train.CHUNK, train.HELD)
    causal, whole = (train.held_out(load_demo_model(path=path)) for path in (CAUSAL_WEIGHTS, None))
    assert causal["later_chunks"] < 0.75 * whole["later_chunks"]
    assert causal["first_chunk"] < 1.1 * whole["first_chunk"]
