"""The conversion recipe of examples/linvideo: what it learns from, its stages on small clips, the shipped result."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdit_fast import accelerate
from vdit_fast.demo.model import load_demo_model
from vdit_fast.linear import SelectiveTransfer

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = (4, 16)  # frames, side in pixels: 64 tokens


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the example, under the names by which they import each other."""
    before = set(sys.modules)
    for folder in ("linvideo", "demo_model"):  # the demo model's train.py is the one that others import
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    import converted
    import matching
    import stages

    yield SimpleNamespace(converted=converted, matching=matching, stages=stages)
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_calls_of_a_sampling_run_carry_the_originals_answers(recipe: Any) -> None:
    model = load_demo_model()
    calls = recipe.matching.trajectory(model, random.Random(0), *SIZE)
    steps = sorted({call.sigma for call in calls}, reverse=True)
    assert recipe.matching.STEPS[0] <= len(steps) <= recipe.matching.STEPS[1] and steps[0] == 1
    assert len(calls) == 2 * len(steps)  # both branches of guidance
    assert sum(not call.text.any() for call in calls) == len(steps)
    assert torch.equal(recipe.matching.asked(model, calls[3]).target, calls[3].target)
    assert recipe.matching.matching_loss(model, calls[-1]).item() == 0


def test_noised_clips_are_what_the_held_out_loss_uses(recipe: Any) -> None:
    rng = random.Random(1)
    calls = [recipe.matching.noised_clip(rng, *SIZE) for _ in range(40)]
    assert all(call.x.shape == (1, 3, 4, 16, 16) and call.target is None and 0 < call.sigma <= 1 for call in calls)
    assert 0 < sum(not call.text.any() for call in calls) < 20
    loud = [call.x.std().item() for call in calls if call.sigma > 0.8]
    assert loud and all(0.6 < std < 1.3 for std in loud)


def test_taps_run_no_further_than_they_must(recipe: Any) -> None:
    model, ran = load_demo_model(), []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    taps = recipe.stages.Taps(model, {i: model.blocks[i].attn1 for i in (1, 3)})
    seen = taps(recipe.matching.noised_clip(random.Random(2), *SIZE))
    assert set(seen) == {1, 3} and ran == [0, 1, 2, 3]
    taps.remove()
    args, kwargs, want = seen[3]
    assert torch.equal(model.blocks[3].attn1(*args, **kwargs), want)


def test_single_layers_learn(recipe: Any) -> None:
    """A few steps on one layer's maps bring its linear attention nearer to the original's softmax attention."""
    original, student = load_demo_model(), load_demo_model()
    transfer = SelectiveTransfer([5], heads=2, head_dim=64, target=1)
    transfer.attach(accelerate(student))
    transfer.round_([5])
    size = (6, 32)
    pool = recipe.stages.Pool(original, {size: 1.0}, (size,), random.Random(3))
    taps = recipe.stages.Taps(original, {5: original.blocks[5].attn1})
    seen = [taps(recipe.matching.noised_clip(pool.rng, *size))[5] for _ in range(6)]
    taps.remove()

    @torch.no_grad()
    def error() -> float:
        found = [(student.blocks[5].attn1(*args, **kwargs) - want).square().mean() for args, kwargs, want in seen]
        return float(sum(found) / sum(want.square().mean() for *_, want in seen))

    before = error()
    groups = {5: [{"params": [transfer.q_maps[0], transfer.k_maps[0]], "lr": 0.015}]}
    clock = SimpleNamespace(until=lambda share: ((i, i / 60) for i in range(60)), log=lambda *args, **values: None)
    attention = lambda model, layer: model.blocks[layer].attn1  # noqa: E731
    recipe.stages.layers_alone(original, student, attention, groups, pool, clock, 1.0, stage="alone")
    assert error() < 0.7 * before


def test_the_shipped_model_is_near_the_original(recipe: Any) -> None:
    """Held-out clips on a small canvas; docs/linear.md has the numbers of the full one."""
    original = load_demo_model()
    model, config = recipe.converted.load_converted()
    rng, losses = random.Random(10**6 + 3), {"original": 0.0, "converted": 0.0}
    with accelerate(model, config) as handle, torch.no_grad():
        assert len(handle.stats()["linear"]["transformer"]) >= 2 and 0 not in handle.stats()["linear"]["transformer"]
        for sigma in (0.95, 0.8, 0.6, 0.4, 0.2):
            clip, prompt = recipe.matching.sample_clip(16, 40, 40, rng)
            noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(5))
            x = (clip * (1 - sigma) + noise * sigma)[None]
            call = recipe.matching.Call(x, sigma, recipe.matching.embed(prompt)[None])
            for name, net in (("original", original), ("converted", model)):
                losses[name] += float((net(**call.arguments())[0] - clip).square().mean())
    assert losses["converted"] < 10**0.1 * losses["original"], losses  # 1 dB
