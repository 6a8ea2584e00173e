"""Every planner: what stands in the padding of q, k and v never reaches the outputs of real tokens."""

from __future__ import annotations

import math

import pytest
import torch

import vdit_fast
from vdit_fast.context import StepContext
from vdit_fast.planners import REGISTRY, from_dict

GRID = (5, 7, 9)
PLANNERS = {
    "adaspa": {"block": 16, "sparsity": 0.7, "dense_steps": 0, "search": [0, 1]},
    "draft": {"pool": [3, 4], "sparsity": 0.7},
    "draft, compensate": {"pool": [3, 4], "pool_t": 2, "sparsity": 0.7, "compensate": True, "sinks": 1},
    "radial": {"decay": 0.1, "block": 8},
    "rettention": {"window": 0.3, "dense_steps": 0, "interval": 2},
    "shifted_window": {"window": [2, 3, 4]},
    "sliding_tile": {"tile": [2, 3, 4], "sparsity": 0.7},
    "sparge": {"block": [32, 16], "sparsity": 0.7},
    "sparge, top_p": {"block": [32, 16], "top_p": 0.5, "similarity": 0.035},
    "sparse_vdit": {"modes": "dmvf", "block": 16, "stripes": {"0.2": "0-3"}},
    "svg1": {"block": 16, "sparsity": 0.7},
    "svg2": {"q_clusters": 12, "k_clusters": 20, "sparsity": 0.7},
    "svg2, compensate": {"q_clusters": 12, "k_clusters": 20, "top_p": 0.5, "compensate": True, "sinks": 1},
    "vsa": {"cube": [2, 3, 4], "sparsity": 0.7, "gate": 0.5},
    "window": {"tile": [1, 3, 4], "rows": 64},
    "window, few rows": {"tile": [1, 3, 4], "rows": 3, "refresh": 1},
    "xattention": {"block": 32, "stride": 8, "top_p": 0.4},
    "xattention, exact": {"block": 16, "stride": 1, "top_p": 0.4},
}
LAYOUTS = [(0, False), (9, False), (9, True)]


def test_every_planner_is_here():
    own = {name for name, cls in REGISTRY.items() if cls.__module__.startswith("vdit_fast.")}
    assert {name.split(",")[0] for name in PLANNERS} == own


def generation(context, name, layout, lengths, tensors):
    """Outputs of four steps, real rows only; and whether each of them was sparse."""
    planner, kv_len, state = from_dict({"method": name.split(",")[0], **PLANNERS[name]}), torch.tensor(lengths), {}
    outs, sparse = [], []
    for step, (q, k, v) in enumerate(tensors):
        fields = {"kv_len": kv_len, "state": state, "step": StepContext(step=step, num_steps=10)}
        ctx = context(GRID, layout[0], text_first=layout[1], **fields)
        decision = planner.decision(q, k, v, ctx)
        out, lse = vdit_fast.attention(
            q, k, v, decision.plan, row_scale=decision.row_scale, kv_len=kv_len, return_lse=True
        )
        if decision.observe is not None:
            decision.observe(out, lse)
        out = out if decision.residual is None else out + decision.residual
        outs.append(out[torch.arange(ctx.num_tokens) < kv_len[:, None]])
        sparse.append(decision.plan is not None and decision.plan.density < 0.95)
    return outs, sparse


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
@pytest.mark.parametrize("name", PLANNERS)
def test_padding_never_changes_real_outputs(context, name, layout):
    """Garbage in q, k and v at once, and in each alone: the leak of one may hide behind another's."""
    text, first = layout
    tokens = 315 + text
    for lengths in ([200, 290], [tokens - 5, 100 + text * first]):
        clean = [(2 * torch.randn(3, 2, tokens, 4, 16)).unbind() for _ in range(4)]
        padding = (torch.arange(tokens) >= torch.tensor(lengths)[:, None])[..., None, None]
        want, sparse = generation(context, name, layout, lengths, clean)
        assert any(sparse) and all(out.isfinite().all() for out in want)
        for spoiled, filling in (("qkv", 1e4), ("qkv", math.nan), ("q", 1e4), ("q", math.nan), ("k", 1e4), ("v", 1e4)):
            dirty = [
                [x.masked_fill(padding, filling) if s in spoiled else x for s, x in zip("qkv", step, strict=True)]
                for step in clean
            ]
            got, _ = generation(context, name, layout, lengths, dirty)
            for a, b in zip(want, got, strict=True):
                assert torch.equal(a, b), (lengths, spoiled, filling)


@pytest.mark.parametrize("name", PLANNERS)
def test_lengths_are_not_read_back(context, name):
    """Tensors without values: any look at one would raise."""
    q, k, v = torch.empty(3, 2, 324, 4, 16, device="meta").unbind()
    ctx = context(GRID, 9, kv_len=torch.empty(2, dtype=torch.int32, device="meta"))
    decision = from_dict({"method": name.split(",")[0], **PLANNERS[name]}).decision(q, k, v, ctx)
    if decision.plan is None:
        decision.observe(torch.empty_like(q), torch.empty(2, 4, 324, device="meta"))
