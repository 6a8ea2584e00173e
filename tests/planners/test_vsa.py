"""VSA: coarse and fine branch on ragged cubes, the number of kept cubes, the gate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import vdit_fast
from vdit_fast.planners import VSA
from vdit_fast.planners._tokens import cut
from vdit_fast.reference import attention


def cubes(grid, size):
    """Cube number of every video token, the slow and obvious way."""
    axes = [cut(n, s) for n, s in zip(grid, size, strict=True)]
    edges = [[i for i, n in enumerate(pieces) for _ in range(n)] for pieces in axes]
    counts = list(map(len, axes))
    return torch.tensor([(t * counts[1] + y) * counts[2] + x for t, y, x in itertools.product(*edges)])


def test_constant_cubes_make_the_coarse_branch_dense_attention(context):
    ctx, planner = context((4, 8, 12)), VSA(cube=(2, 4, 4), gate=1.0)
    label = cubes(ctx.grid, planner.cube)
    q, k, v = (torch.randn(1, int(label.max()) + 1, 2, 16)[:, label] for _ in range(3))
    coarse = planner.coarse(planner.scores(q, k, ctx), v, ctx)
    torch.testing.assert_close(coarse, attention(q, k, v), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("kv_len", [None, (290, 324)])
def test_residual_is_the_gated_coarse_branch(context, text_first, kv_len):
    ctx, planner = context((5, 7, 9), 9, text_first=text_first), VSA(cube=(2, 3, 4), sparsity=0.6, gate=-0.75)
    ctx.kv_len = None if kv_len is None else torch.tensor(kv_len)
    label = cubes(ctx.grid, planner.cube)
    q, k, v = torch.randn(3, 2, ctx.num_tokens, 4, 8, dtype=torch.float64).unbind()
    k, v = k[:, :, :2], v[:, :, :2]
    decision = planner.decision(q.float(), k.float(), v.float(), ctx)
    real = torch.arange(ctx.num_tokens) < (ctx.num_tokens if kv_len is None else ctx.kv_len[:, None])
    want = torch.zeros_like(q)
    keep = torch.zeros(2, 4, ctx.n_video, ctx.n_video, dtype=torch.bool)
    for b, h in itertools.product(range(2), range(4)):
        inside = [(label == c) & real.expand(2, -1)[b, ctx.video_slice] for c in range(int(label.max()) + 1)]
        mean = [
            torch.stack([x[b, ctx.video_slice, g][i].mean(0) if i.any() else x.new_zeros(8) for i in inside])
            for x, g in ((q, h), (k, h // 2), (v, h // 2))
        ]
        scores = mean[0] @ mean[1].T / math.sqrt(8)
        scores[:, [not i.any() for i in inside]] = -math.inf
        want[b, ctx.video_slice, h] = -0.75 * (scores.softmax(-1) @ mean[2])[label]
        best = scores.topk(math.ceil(0.4 * len(inside)), -1).indices
        keep[b, h] = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)[label][:, label]
    torch.testing.assert_close(decision.residual.double(), want, rtol=1e-4, atol=1e-5)
    video = decision.plan.to_mask()[..., ctx.video_slice, ctx.video_slice]
    rows = real.expand(2, -1)[:, None, ctx.video_slice].expand(2, 4, -1)  # all keys tie for a cube of padding
    assert torch.equal(video[rows], keep[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_zero_has_no_residual_and_sparsity_zero_is_dense(context, dtype):
    ctx = context((5, 7, 9))
    q, k, v = torch.randn(3, 1, ctx.num_tokens, 2, 16).to(dtype).unbind()
    decision = VSA(sparsity=0).decision(q, k, v, ctx)
    assert decision.residual is None and decision.plan.density == 1
    gated = VSA(sparsity=0, gate=0.5).decision(q, k, v, ctx)
    assert gated.residual.dtype == dtype and gated.residual.shape == q.shape and gated.plan.density == 1


def test_whole_output_with_one_cube(context):
    ctx = context((2, 3, 4))
    q, k, v = torch.randn(3, 1, 24, 2, 16).unbind()
    decision = VSA(gate=2.0).decision(q, k, v, ctx)
    out = vdit_fast.attention(q, k, v, decision.plan) + decision.residual
    torch.testing.assert_close(out, attention(q, k, v) + 2 * v.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.9, 1), (0.7, 3), (0.75, 3), (0.8, 2), (0.25, 8), (0.999, 1), (0.0, 10)]
)
def test_number_of_kept_cubes(context, sparsity, kept):
    ctx = context((1, 4, 40))  # 10 cubes
    q, k = torch.randn(2, 1, 160, 2, 8).unbind()
    assert VSA(sparsity=sparsity).plan(q, k, ctx).density == pytest.approx(kept / 10)


def test_infinite_values_of_padding_stay_out_of_the_residual(context):
    ctx = context((2, 8, 8), kv_len=torch.tensor([90]))
    q, k, v = torch.randn(3, 1, 128, 2, 8).unbind()
    v[:, 90:] = math.inf
    k[:, 90:] = math.nan
    assert VSA(gate=1.0).decision(q, k, v, ctx).residual.isfinite().all()
