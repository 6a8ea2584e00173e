"""XAttention: antidiagonal masses, the selection by mass."""

from __future__ import annotations

import math

import pytest
import torch

from vdit_fast.planners import XAttention


def exact_mass(q, k, block):
    """Attention weights summed over blocks, divided by the block's rows: fp64 [B, H, n, n]."""
    weight = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1]), -1)
    rows = torch.stack([part.sum(2) for part in weight.split(block, 2)], 2) / block
    return torch.stack([part.sum(3) for part in rows.split(block, 3)], 3)


@pytest.mark.parametrize("grid", [(5, 7, 9), (4, 8, 8)])
def test_stride_one_gives_the_exact_masses(context, grid):
    ctx = context(grid)
    q, k = torch.randn(2, 2, ctx.num_tokens, 3, 8).unbind()
    mass = XAttention(stride=1, block=32).mass(q, k, ctx)
    torch.testing.assert_close(mass.double(), exact_mass(q, k, 32), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_scores_are_sums_along_antidiagonals(context, stride):
    ctx = context((2, 8, 8))
    q, k = torch.randn(2, 1, 128, 2, 8).unbind()
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    patches = scores.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # [b, h, i, r, j, c]
    r = torch.arange(stride)
    along = patches[:, :, :, stride - 1 - r, :, r].sum(0)  # (r in front) → [b, h, i, j]
    weight = torch.softmax(along / (stride * math.sqrt(8)), -1)
    want = weight.unflatten(3, (-1, 32 // stride)).sum(4).unflatten(2, (-1, 32 // stride)).mean(3)
    got = XAttention(stride=stride, block=32).mass(q, k, ctx)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize(("text", "text_first"), [(0, False), (5, True)])
def test_reads_the_fewest_blocks_that_hold_the_share(context, top_p, text, text_first):
    ctx, planner = context((5, 7, 9), text, text_first=text_first), XAttention(stride=4, block=16, top_p=top_p)
    q, k = (2 * torch.randn(2, 1, ctx.num_tokens, 2, 8)).unbind()
    mass = planner.mass(q, k, ctx).double()
    mass = mass / mass.sum(-1, keepdim=True)
    video = planner.plan(q, k, ctx).validate().to_mask()[..., ctx.video_slice, ctx.video_slice]
    keep = video[:, :, ::16, ::16]
    assert torch.equal(keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :315, :315], video)
    held = (mass * keep).sum(-1)
    weakest = mass.masked_fill(~keep, math.inf).amin(-1)
    assert (held >= top_p - 1e-6).all() and (held - weakest <= top_p + 1e-6).all()
    assert (weakest >= mass.masked_fill(keep, 0).amax(-1) - 1e-9).all()
    assert keep.any(-1).all() and (top_p < 1 or keep.all())


@pytest.mark.parametrize("length", [250, 315])
@pytest.mark.parametrize("text_first", [False, True])
def test_padding_keys_have_no_mass(context, length, text_first):
    ctx = context((5, 7, 9), 6, text_first=text_first, kv_len=torch.tensor([length]))
    q, k = torch.randn(2, 1, ctx.num_tokens, 2, 8).unbind()
    q[:, length:] = k[:, length:] = 1e4
    mass = XAttention(stride=1, block=16).mass(q, k, ctx)
    real = slice(ctx.video_slice.start, min(length, ctx.video_slice.stop))
    want = exact_mass(q[:, real], k[:, real], 16)
    blocks = want.shape[-1]
    torch.testing.assert_close(mass[..., :blocks, :blocks].double(), want, rtol=1e-4, atol=1e-6)
    assert (mass[:, :, :blocks, blocks:] == 0).all()
    assert torch.equal(mass[:, :, blocks:], torch.eye(20)[blocks:].expand(1, 2, -1, -1))  # padding reads itself


@pytest.mark.parametrize("stride", [4, 8])
def test_folded_queries_of_padding_alone_count_for_nothing(context, stride):
    """Masses of a clip that ends at row 205, within a folded query: those of the clip without the rest."""
    ctx = context((5, 7, 9), kv_len=torch.tensor([205]))
    q, k = torch.randn(2, 1, 315, 2, 8).unbind()
    alone = XAttention(stride=stride, block=32).mass(q[:, :205], k[:, :205], context((1, 1, 205)))
    mass = XAttention(stride=stride, block=32).mass(q, k, ctx)
    torch.testing.assert_close(mass[..., :7, :7], alone, rtol=1e-5, atol=1e-6)


def test_large_blocks_are_not_clipped(context):
    """More rows than the selection's largest mass: the mean over the rows is selected, not their sum."""
    ctx = context((4, 16, 16))
    q, k = torch.randn(2, 1, 1024, 1, 8).unbind()
    planner = XAttention(stride=1, block=512, top_p=0.0)
    mass = planner.mass(q, k, ctx)
    assert mass.amax() < 1
    want = mass == mass.amax(-1, keepdim=True)
    assert torch.equal(planner.plan(q, k, ctx).to_mask()[:, :, ::512, ::512], want)
