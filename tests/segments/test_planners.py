"""Memory rows beside every planner: read by every query, whatever is left out, permuted, scaled or observed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from planner_settings import FAMILIES, PLANNERS, TIMES, build, config, plugged, setting
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.planners import Rettention

M = 1000 % 64  # the last block of memory


def generate(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return [tiny.run(model, tiny.at(inputs, t)) for t in TIMES]


def explicit(q: Tensor, k: Tensor, v: Tensor, plan: Any, options: dict[str, Any]) -> Tensor:
    """The same attention in fp64 over all keys under a mask of all keys."""
    batch, lk = q.shape[0], k.shape[1]
    mask = torch.ones(1, 1, q.shape[1], lk, dtype=torch.bool) if plan is None else plan.to_mask()
    if options.get("kv_len") is not None:
        mask = mask & (torch.arange(lk) < options["kv_len"].view(-1, 1)).view(-1, 1, 1, lk)
    segments = options.get("segments") or []
    mask = nn.functional.pad(mask, (0, sum(s.shape[1] for s, _ in segments)), value=True)
    k, v = (torch.cat([x, *(s[i].expand(batch, -1, -1, -1) for s in segments)], 1) for i, x in enumerate((k, v)))
    groups = q.shape[2] // k.shape[2]
    heads = (q, *(x.repeat_interleave(groups, 2) for x in (k, v)))
    return nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in heads), attn_mask=mask, scale=options.get("scale")
    ).transpose(1, 2)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("planner", PLANNERS)
def test_sparse_video_beside_dense_memory_is_the_explicit_mask(
    planner: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(kind)
    handle = plugged(model, config(planner))
    without = generate(model, inputs)
    handle.memory(torch.randn(M, 32))
    found = {"sparse": 0, "read": 0}

    def checked(q: Tensor, k: Tensor, v: Tensor, plan: Any = None, **options: Any) -> Any:
        result = vdit_fast.attention(q, k, v, plan, **options)
        out = result[0] if isinstance(result, tuple) else result
        if options.get("row_scale") is None and (plan is None or plan.stand_ins is None):
            assert tiny.relative(out, explicit(q, k, v, plan, options)) < 1e-5
        segments = options.get("segments") or []
        found["read"] += bool(segments) or k.shape[1] == M
        found["sparse"] += plan is not None
        return result

    monkeypatch.setattr("vdit_fast.models.heads.attention", checked)
    got = generate(model, inputs)
    calls = sum(layer["calls"] for layer in handle.stats()["layers"]) // 2
    assert found["read"] == calls and found["sparse"] > 0
    assert all(x.isfinite().all() for x in got)
    assert min(tiny.relative(a, b) for a, b in zip(got, without, strict=True)) > 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("planner", PLANNERS)
def test_the_loosest_setting_is_dense_attention_with_memory(planner: str, kind: str) -> None:
    loose = setting(planner).loose
    if loose is None:
        pytest.skip("no knob of this planner keeps everything")
    model, inputs = build(kind)
    rows = torch.randn(M, 32)
    handle = accelerate(model).memory(rows)
    want = generate(model, inputs)
    handle.remove()
    plugged(model, config(planner, **loose)).memory(rows)
    for a, b in zip(generate(model, inputs), want, strict=True):
        assert tiny.relative(a, b) < 1e-4


@pytest.mark.parametrize("kind", ["wan", "hunyuan_video"])
def test_what_rettention_makes_up_for_is_the_sequences_own(kind: str) -> None:
    """rho and the residual stand for the sequence's keys: with the very inputs that they were measured with they make
    the window's output the dense one, and memory must not enter twice."""
    model, inputs = build(kind)
    rows = torch.randn(M, 32)
    dense = accelerate(model).memory(rows)
    want = tiny.run(model, inputs)
    dense.remove()
    handle = accelerate(model, Config(attention=Rettention(dense_steps=0, window=0.25, interval=4, dense_layers=0)))
    handle.memory(rows)
    for step in range(2):  # the caching step, and the one behind it, of which nothing has grown yet
        with handle.step(step, timestep=500.0, num_steps=9):
            got = tiny.run(model, inputs)
        assert tiny.relative(got, want) < 1e-5
    assert handle.stats()["layers"][0]["sparse_calls"] == 1
