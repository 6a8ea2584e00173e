"""Radial attention: published densities, and the mask against its definition token by token."""

from __future__ import annotations

import math

import pytest
import torch

from vdit_fast.planners import Radial
from vdit_fast.planners._tokens import cut


def definition(planner, frames, tokens):
    """The block mask [frames · n, frames · n] from the token mask, written out."""
    power = 2 ** (math.floor(math.log2(tokens)) + 1)
    edges = [0, *torch.tensor(cut(tokens, planner.block)).cumsum(0).tolist()]
    n = len(edges) - 1
    place = torch.arange(tokens)
    away = (place[:, None] - place).abs()
    out = torch.zeros(frames * n, frames * n, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            part = power / 2 ** len(f"{d:b}" if d else "")
            inside = away <= (tokens if d <= 1 else max(planner.decay * part, planner.block))
            if planner.thinning and d > 1 and part < planner.block and d % int(planner.block / part):
                inside = inside & False
            for a in range(n):
                for b in range(n):
                    share = inside[edges[a] : edges[a + 1], edges[b] : edges[b + 1]].double().mean(0)
                    used = (share > 0).sum()
                    out[i * n + a, j * n + b] = int(used) > 0 and int((share > 1 / 3).sum()) / int(used) > 0.6
    return out


@pytest.mark.parametrize(
    ("frames", "decay", "sinks", "density"),
    [
        (18, 0.2, 1, 0.2871),  # Wan 2.1, 69 frames of 768 × 1280
        (21, 0.2, 1, 0.2614),  # Wan 2.1, 81 frames
        (30, 0.95, 0, 0.2746),  # HunyuanVideo, 117 frames
        (20, 0.8, 1, 0.3525),  # Wan 2.2, 77 frames
    ],
)
def test_densities_of_the_published_settings(context, frames, decay, sinks, density):
    ctx = context((frames, 48, 80))
    q = torch.empty(1, ctx.num_tokens, 1, 1)
    plan = Radial(decay=decay, sinks=sinks).plan(q, q, ctx)
    assert abs(plan.density - density) < 1e-4
    assert (plan.tiles[:, 2] == 128).all()


@pytest.mark.parametrize("thinning", [False, True])
@pytest.mark.parametrize(
    ("grid", "block", "decay"),
    [
        ((10, 4, 8), 8, 0.5),
        ((7, 5, 9), 8, 0.3),
        ((17, 5, 7), 16, 0.9),
        ((6, 3, 5), 32, 0.2),
        ((5, 1, 1), 4, 0.0),
        ((6, 4, 6), 3, 0.3),
    ],
)
def test_mask_is_the_definition(context, grid, block, decay, thinning):
    planner = Radial(decay=decay, block=block, thinning=thinning, sinks=0)
    frames, tokens = grid[0], grid[1] * grid[2]
    want = definition(planner, frames, tokens)
    assert torch.equal(planner.mask(frames, tokens), want)
    ctx = context(grid, 5, text_first=True)
    q = torch.randn(1, ctx.num_tokens, 1, 4)
    token = torch.repeat_interleave(torch.tensor(cut(tokens, block) * frames))
    mask = planner.plan(q, q, ctx).validate().to_mask()
    assert mask.shape[:2] == (1, 1)  # one for all heads
    assert torch.equal(mask[0, 0, ctx.video_slice, ctx.video_slice], want[token][:, token])


@pytest.mark.parametrize("tokens", [64, 63, 96])
def test_near_frames_are_full_and_the_mask_symmetric(tokens):
    block, frames = 16, 10
    mask = Radial(decay=0.1, block=block).mask(frames, tokens)
    n = len(cut(tokens, block))
    pairs = mask.view(frames, n, frames, n).transpose(1, 2)
    frame = torch.arange(frames)
    near = (frame[:, None] - frame).abs() <= 1
    assert pairs[near].all() and not pairs[~near].all()
    if tokens % block == 0:
        assert torch.equal(mask, mask.mT)


def test_thinned_distances_are_multiples():
    # 64 tokens, P = 128, blocks of 32: from distance 8 on P / 2^g is 8, so that every 4th distance is read
    mask = Radial(decay=0.0, block=32).mask(32, 64)
    first = mask.view(32, 2, 32, 2)[0].any(2).any(0)
    read = {d for d in range(32) if first[d]}
    assert {d for d in read if 8 <= d < 16} == {8, 12} and {d for d in read if d >= 16} == {16, 24}
    assert {0, 1, 2, 3, 4, 6} == {d for d in read if d < 8}


def test_long_videos_need_no_token_mask(context):
    ctx = context((33, 45, 80), 256)  # 118,800 tokens: a token mask would have 14 billion entries
    q = torch.empty(1, ctx.num_tokens, 1, 1)
    plan = Radial(decay=0.95, sinks=0).plan(q, q, ctx).validate()
    assert len(plan.tiles) == 33 * 29 + 2 and set(plan.tiles[:, 2].tolist()) == {124, 125, 128}
    assert 0.25 < plan.density < 0.32
