"""DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance (Shen et al., arXiv 2505.14708).

A low-resolution (pooled) attention map picks the pairs of patches; tokens are reordered so that a patch is contiguous,
the kept blocks are computed, and the result comes back in the original order.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vdit_fast
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.planners import Draft

GRID, POOL = (3, 16, 32), (8, 16)


def layer(grid: tuple[int, int, int], text: int = 0) -> LayerContext:
    return LayerContext(0, 1, "attn", grid, math.prod(grid), text, step=StepContext(step=0, num_steps=10))


def run(planner: Draft, q: Tensor, k: Tensor, v: Tensor, text: int = 0) -> Tensor:
    return vdit_fast.attention(q, k, v, planner.plan(q, k, layer(GRID, text)))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def patch_of_token() -> Tensor:
    """The paper's reordering, from token to patch: frame by frame, rows of patches, patches of a row."""
    frame, row, column = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    rows, columns = GRID[1] // POOL[0], GRID[2] // POOL[1]
    return ((frame * rows + row // POOL[0]) * columns + column // POOL[1]).flatten()


def published_mask(q: Tensor, k: Tensor, sparsity: float) -> Tensor:
    """The published rule on pooled tokens: softmax, k-th smallest probability of the head's map as the threshold."""
    patch = patch_of_token()
    count = int(patch.max()) + 1
    low_q, low_k = (torch.stack([x[:, patch == i].mean(1) for i in range(count)], 2) for x in (q, k))
    draft = torch.softmax(low_q @ low_k.mT / q.shape[-1] ** 0.5, -1)
    threshold = draft.flatten(-2).kthvalue(int(sparsity * count**2), -1).values
    return draft >= threshold[..., None, None]


@pytest.mark.parametrize("text", [0, 20])
def test_keeping_everything_is_dense_attention(text: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, math.prod(GRID) + text, 2, 32).unbind()
    torch.testing.assert_close(run(Draft(sparsity=0.0), q, k, v, text), dense(q, k, v), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_mask_is_the_published_one_on_constant_blocks(sparsity: float) -> None:
    """Where q and k are constant in every patch the draft is exact, and the selection is that of the true weights."""
    torch.manual_seed(1)
    patch = patch_of_token()
    q, k = torch.randn(2, 1, int(patch.max()) + 1, 3, 32)[:, :, patch].unbind()
    v = torch.randn(q.shape)
    keep = published_mask(q.double(), k.double(), sparsity)
    true = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 32**0.5, -1)
    first = torch.stack([(patch == i).nonzero()[0, 0] for i in range(keep.shape[-1])])
    weights = true[:, :, first][..., first]
    assert torch.equal(keep, weights >= weights.masked_fill(~keep, 2).amin((-2, -1), keepdim=True))
    keep |= weights == weights.amax(-1, keepdim=True)  # this package's addition: no row without its strongest patch
    mask = keep[:, :, patch][..., patch]
    assert torch.equal(Draft(sparsity=sparsity).plan(q, k, layer(GRID)).to_mask(), mask)
    torch.testing.assert_close(run(Draft(sparsity=sparsity), q, k, v), dense(q, k, v, mask), atol=2e-6, rtol=1e-4)


def test_number_of_blocks_that_stay() -> None:
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, math.prod(GRID), 4, 32).unbind()
    keep = Draft(sparsity=0.6).plan(q, k, layer(GRID)).to_mask()
    first = torch.stack([(patch_of_token() == i).nonzero()[0, 0] for i in range(12)])
    blocks = keep[:, :, first][..., first]
    published = published_mask(q, k, 0.6)
    assert (published.sum((-2, -1)) == 144 - int(0.6 * 144) + 1).all()
    assert (published <= blocks).all() and (blocks.sum((-2, -1)) <= published.sum((-2, -1)) + 12).all()


def test_text_is_read_by_all_and_reads_all() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(2, 1, math.prod(GRID) + 9, 2, 32).unbind()
    mask = Draft(sparsity=0.9).plan(q, k, layer(GRID, 9)).to_mask()
    assert mask[..., -9:].all() and mask[:, :, -9:].all() and mask[..., :-9, :-9].float().mean() < 0.3


def test_the_draft_finds_the_weight_where_neighbours_look_alike() -> None:
    """What the method is for: most of the attention weight lies in the blocks that stay."""
    torch.manual_seed(4)
    place = torch.stack(torch.meshgrid(*(torch.linspace(0, 3, n) for n in GRID), indexing="ij"), -1).flatten(0, 2)
    waves = torch.cos(place @ torch.randn(3, 32) * 2 + torch.rand(32) * 6)
    q, k = (3 * waves + 0.3 * torch.randn(2, *waves.shape))[:, None, :, None].unbind()
    weight = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 32**0.5, -1)
    mask = Draft(sparsity=0.75).plan(q, k, layer(GRID)).to_mask()
    assert mask.float().mean() < 0.35
    assert (weight * mask).sum(-1).mean() > 0.75
