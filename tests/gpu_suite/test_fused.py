"""The operators' contenders of the GPU suite: every one is built, runs, and returns what the model's own chain does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.gpu import fused

SHAPES = {
    "qk_norm_rope": (40,), "kv_cache": (16,), "linear_attention": (2, 100, 64), "pack": (1, 16, 4, 128, 2),
    "short_attention": (5, 12, 2, 24),
}  # fmt: skip
SMALL = {case.name: replace(case, shape=SHAPES.get(case.operator, (50, 64))) for case in fused.FULL_CASES}


@pytest.mark.parametrize("name", SMALL)
def test_contenders_agree(name: str) -> None:
    case = SMALL[name]
    torch.manual_seed(0)
    with torch.no_grad():
        moved, calls = fused.build(case, "cpu")
        assert moved > 0 and {fused.OWN, fused.TORCH} <= set(calls)
        results = {key: call() for key, call in calls.items()}
    assert fused.difference(results[fused.OWN], results[fused.TORCH]) < fused.limit(case)


def test_codes_are_compared_as_what_they_stand_for() -> None:
    case = SMALL["cache/update, order 1, e4m3"]
    torch.manual_seed(0)
    with torch.no_grad():
        _, calls = fused.build(case, "cpu")
        own, want = calls[fused.OWN](), calls[fused.TORCH]()
    assert 2e-2 < fused.difference(own, want) < fused.limit(case)  # two roundings: more than one to bf16 makes
    for i in range(2):
        for wrong in ((own[i][0], own[i][1] * 1.1), (own[i][0].roll(1, 0), own[i][1])):
            assert fused.difference([*own[:i], wrong, *own[i + 1 :]], want) > fused.limit(case)
