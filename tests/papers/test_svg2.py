"""Sparse VideoGen2 (arXiv 2505.18875): video generation with sparse attention by semantic-aware permutation.

Clusters of queries and keys, top-p, attention over clusters of any size: through the compiled operators.
"""

from __future__ import annotations

import math

import pytest
import torch

import vdit_fast
from vdit_fast import ops
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.plan import AttentionPlan
from vdit_fast.planners import SVG2
from vdit_fast.planners.svg2 import masses
from vdit_fast.reference import attention

GRID = (4, 9, 10)
MASSES = (0.5, 0.25, 0.1875, 0.0625)
SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 1, 0)


def context(**fields):
    n = math.prod(GRID)
    return LayerContext(0, 4, "blocks.0.attn1", GRID, n, step=StepContext(step=0, num_steps=4), **fields)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def labels(clusters, head):
    """int64 [n]: every token's cluster."""
    count = clusters.lengths.shape[-1]
    sorted_labels = torch.arange(count).repeat_interleave(clusters.lengths[0, head].long())
    return torch.empty_like(sorted_labels).scatter_(0, clusters.order[0, head].long(), sorted_labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_the_mass_is_dense_attention(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, math.prod(GRID), 2, 64).to(dtype).unbind()
    plan = SVG2(top_p=1).plan(q, k, context()).validate()
    exact = attention(q.double(), k.double(), v.double())
    by_torch = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch_error = distance(by_torch.transpose(1, 2), exact)
    assert distance(vdit_fast.attention(q, k, v, plan), exact) <= 2 * torch_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inverse_permutation_restores_every_bit(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, math.prod(GRID), 3, 64).to(dtype)
    rows, _ = SVG2().clusters(x, x, context())
    assert not torch.equal(ops.permute_tokens(x, rows.order), x)
    assert torch.equal(ops.permute_tokens(ops.permute_tokens(x, rows.order), rows.order, inverse=True), x)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_mass_of_duplicated_tokens_is_exact(kv_heads):
    """Tokens that equal their centroid: the estimate is the softmax mass itself, for clusters of unequal size."""
    torch.manual_seed(0)
    n, ctx = math.prod(GRID), context()
    q_points, k_points = torch.randn(1, 12, 2, 16), torch.randn(1, 20, kv_heads, 16)
    # the seeds of k-means fall on tokens: enough clusters that every point gets one
    q = q_points[:, torch.arange(12).repeat(n)[torch.randperm(n)]]
    k = k_points[:, (20 * torch.rand(n) ** 2).long()]
    planner = SVG2(q_clusters=n, k_clusters=n)
    rows, columns = planner.clusters(q, k, ctx)
    found = masses(rows, columns)
    assert int(columns.sizes.max()) > 2 * int(columns.sizes[columns.sizes > 0].min())
    wide = k.repeat_interleave(2 // kv_heads, 2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), wide.double()).div(4).softmax(-1)[0]
    for head in range(2):
        q_label, k_label = (labels(x, head if x is rows else head % kv_heads) for x in (rows, columns))
        member = torch.nn.functional.one_hot(k_label, columns.sizes.shape[-1]).double()
        exact = weights[head] @ member  # mass of every key cluster for every query
        torch.testing.assert_close(found[0, head][q_label].double(), exact, atol=1e-6, rtol=1e-4)
    # and what the plan keeps is what these masses say: the least that exceeds top_p
    mask = SVG2(q_clusters=n, k_clusters=n, top_p=0.7, min_keep_ratio=0).plan(q, k, ctx).to_mask()[0]
    kept = (weights * mask).sum(-1)
    least = torch.where(mask, weights, math.inf).amin(-1)
    assert (kept > 0.7 - 1e-6).all() and (mask.sum(-1) < n).all() and (least > 0).all()
    for head in range(2):
        k_label = labels(columns, head % kv_heads)
        mass = weights[head] @ torch.nn.functional.one_hot(k_label, columns.sizes.shape[-1]).double()
        read = torch.zeros_like(mass).index_add_(1, k_label, mask[head].double()) > 0
        last = torch.where(read, mass, math.inf).amin(-1)
        assert (kept[head] - last <= 0.7 + 1e-6).all()  # without its last cluster it would not


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.93, 3), (0.9375, 4), (0.99, 4), (1.0, 4)]
)
def test_top_p_counts(top_p, kept):
    """Key clusters of one token with masses 8, 4, 3, 1 of 16: a mass that only reaches top_p asks for one more."""
    ctx = LayerContext(0, 4, "a", (1, 1, 4), 4, step=StepContext(step=0, num_steps=4))
    q = torch.zeros(1, 4, 1, 2)
    q[..., 0] = math.sqrt(2)  # scores are then the keys' first component
    k = torch.zeros(1, 4, 1, 2)
    k[0, :, 0, 0] = torch.tensor(MASSES)[[2, 0, 3, 1]].log()
    rows, columns = SVG2(q_clusters=1, k_clusters=4).clusters(q, k, ctx)
    in_order = masses(rows, columns)[0, 0, 0, labels(columns, 0)]
    torch.testing.assert_close(in_order, torch.tensor(MASSES)[[2, 0, 3, 1]], atol=1e-7, rtol=1e-6)
    nudged = top_p + (1e-6 if top_p in (0.5, 0.75, 0.9375) else 0)  # exp and log round
    mask = SVG2(q_clusters=1, k_clusters=4, top_p=min(nudged, 1.0), min_keep_ratio=0).plan(q, k, ctx).to_mask()
    assert (mask.sum(-1) == kept).all() and mask[..., 1].all() and (kept < 2 or mask[..., 3].all())
    # on the masses themselves, where ties are exact
    exact = torch.tensor(MASSES).expand(1, 1, 1, 4)
    assert int(SVG2(top_p=top_p, min_keep_ratio=0).select(exact, columns.sizes).sum()) == kept


def test_clusters_keep_more_mass_than_chance():
    """What the method is for: where tokens lie in clusters, scattered over the video, few pairs hold the mass."""
    torch.manual_seed(0)
    n, points = math.prod(GRID), 8
    q_side, k_side = (torch.randint(points, (n,)) for _ in range(2))
    centre = torch.nn.functional.one_hot(torch.arange(points), 32).float() * 6
    q, k = ((centre[side] + 0.3 * torch.randn(n, 32))[None, :, None].repeat(1, 1, 2, 1) for side in (q_side, k_side))
    planner, ctx = SVG2(q_clusters=24, k_clusters=48, sparsity=0.8), context()
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).div(32**0.5).softmax(-1)
    mask = planner.plan(q, k, ctx).validate().to_mask()
    density = float(mask.double().mean())
    assert 0.12 < density <= 0.25
    kept = float((weights * mask).sum(-1).mean())
    best = float(weights.sort(-1, descending=True).values[..., : round(density * n)].sum(-1).mean())
    chance = float((weights * (torch.rand(mask.shape) < density)).sum(-1).mean())
    assert chance < 0.3 and kept > 0.95 * best and kept > 0.8, (kept, best, chance)


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clusters_of_any_size(dtype, compensate):
    """Sizes 0, 1 and around the kernels' tiles: equal to dense attention under the mask map[label_q][:, label_k]."""
    torch.manual_seed(0)
    n, count = sum(SIZES), len(SIZES)
    q, k, v = torch.randn(3, 1, n, 2, 64).to(dtype).unbind()
    labels = torch.arange(count).repeat_interleave(torch.tensor(SIZES))
    q_labels, k_labels = (torch.stack([labels[torch.randperm(n)] for _ in range(2)])[None].int() for _ in range(2))
    (q_order, q_sizes), (k_order, k_sizes) = ops.counting_sort(q_labels, count), ops.counting_sort(k_labels, count)
    assert q_sizes[0, 0].tolist() == list(SIZES)
    keep = torch.rand(1, 2, count, count) < 0.4
    keep[..., 3] = True  # no row without keys
    plan = AttentionPlan.from_clusters(keep, q_sizes, k_sizes, q_order, k_order, compensate=compensate).validate()
    mask = torch.stack([keep[0, h][q_labels[0, h].long()][:, k_labels[0, h].long()] for h in range(2)])
    assert torch.equal(plan.to_mask()[0], mask)
    wide = [x.double().transpose(1, 2) for x in (q, k, v)]
    bias = torch.zeros(2, n, n, dtype=torch.float64).masked_fill(~mask, -math.inf)
    if compensate:  # the same by hand: a mean key and value per dropped cluster, with the weight of its tokens
        member = torch.nn.functional.one_hot(k_labels.long(), count).double().mT  # [1, H, clusters, N]
        size = member.sum(-1)
        for i in (1, 2):
            wide[i] = torch.cat([wide[i], (member @ wide[i]) / size.clamp(min=1)[..., None]], 2)
        rest = torch.stack([~keep[0, h][q_labels[0, h].long()] for h in range(2)]) & (size[0] > 0)[:, None]
        more = size[0].log()[:, None].expand(2, n, count).masked_fill(~rest, -math.inf)
        bias = torch.cat([bias, more], -1)
    exact = ((wide[0] @ wide[1].mT / 8 + bias).softmax(-1) @ wide[2]).transpose(1, 2)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[None]
    )
    plain = (wide[0] @ wide[1][:, :, :n].mT / 8).masked_fill(~mask, -math.inf).softmax(-1) @ wide[2][:, :, :n]
    assert distance(vdit_fast.attention(q, k, v, plan), exact) <= 2 * distance(sdpa, plain)
