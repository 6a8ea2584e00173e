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
from vdit_fast.reference import attention

GRID = (4, 9, 10)
SIZES = (0, 1, 63, 64, 65, 127, 128, 129, 1, 0)


def context(**fields):
    n = math.prod(GRID)
    return LayerContext(0, 4, "blocks.0.attn1", GRID, n, step=StepContext(step=0, num_steps=4), **fields)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


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
