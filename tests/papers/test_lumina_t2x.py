"""Lumina-T2X: Transforming Text into Any Modality ... via Flow-based Large Diffusion Transformers (arXiv 2405.05945).

Flag-DiT: one axis of positions over a sequence with [nextline] and [nextframe] tokens, and a zero-initialised gated
attention to the text beside the self-attention.
"""

from __future__ import annotations

import math

import pytest
import torch

import vdit_fast
from vdit_fast.ops import gated_attention
from vdit_fast.plan import AttentionPlan
from vdit_fast.positions import frequencies, interpolated, marked_sequence, rope_tables

GRID = (2, 3, 5)


def draw(tokens, text=9, heads=4, kv_heads=4, dim=32):
    q = torch.randn(2, tokens, heads, dim)
    k, v = torch.randn(2, 2, tokens, kv_heads, dim)
    return q, k, v, *torch.randn(2, 2, text, kv_heads, dim)


def rotate(x, ids, axis):
    cos, sin = rope_tables(ids, [axis], "compact")
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def softmax_attention(q, k, v, mask=None):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())


def test_gate_zero_is_no_text_at_all():
    q, k, v, k_text, v_text = draw(33)
    own = vdit_fast.attention(q, k, v)
    assert torch.equal(gated_attention(q, k, v, k_text, 1e6 * v_text, torch.zeros(4)), own)
    assert (gated_attention(q, k, v, k_text, v_text, torch.full((4,), 0.1)) - own).abs().max() > 1e-2


def test_two_softmaxes_and_a_gate_per_head():
    """Not the softmax over [video, text]: every head adds tanh(gate) times an attention of its own."""
    q, k, v, k_text, v_text = draw(33)
    gate = torch.tensor([-2.0, 0.0, 0.5, 9.0])
    out = gated_attention(q, k, v, k_text, v_text, gate)
    want = softmax_attention(q, k, v) + gate.double().tanh()[:, None] * softmax_attention(q, k_text, v_text)
    torch.testing.assert_close(out.double(), want, atol=4e-6, rtol=1e-5)


def test_positions_count_the_markers():
    """A token's distance to the next row is the width plus one; [nextframe] adds one more between frames."""
    layout = marked_sequence(GRID)
    video = layout.ids[layout.video, 0].view(GRID)
    assert ((video[:, 1:] - video[:, :-1]) == GRID[2] + 1).all()
    assert ((video[1:] - video[:-1]) == GRID[1] * (GRID[2] + 1) + 1).all()
    assert torch.equal(layout.lines, video[..., -1].flatten() + 1)
    assert torch.equal(layout.frames, video[:, -1, -1] + 2)


def test_rope_of_the_marked_sequence():
    """Scores depend on distances in the marked sequence; rope_scaling_factor divides them."""
    layout = marked_sequence(GRID)
    q, k = torch.randn(2, 1, 1, 1, 32)
    for factor in (1.0, 1.5):
        axis = interpolated(32, 10000.0, factor)
        n = layout.length
        turned_q = rotate(q.expand(1, n, 1, 32), layout.ids, axis)
        turned_k = rotate(k.expand(1, n, 1, 32), layout.ids, axis)
        scores = turned_q[0, :, 0].double() @ turned_k[0, :, 0].double().T
        for gap in (0, 1, GRID[2] + 1):
            same = scores.diagonal(gap)
            torch.testing.assert_close(same, same[:1].expand_as(same), atol=2e-5, rtol=0)
        even, odd = (q[0, 0, 0, i::2].double() for i in (0, 1))
        key_even, key_odd = (k[0, 0, 0, i::2].double() for i in (0, 1))
        turn = frequencies(32) * (GRID[2] + 1) / factor
        want = ((even * key_even + odd * key_odd) * turn.cos() + (even * key_odd - odd * key_even) * turn.sin()).sum()
        torch.testing.assert_close(scores[GRID[2] + 1, 0], want, atol=2e-5, rtol=0)


def test_markers_stay_at_the_row_ends_under_a_permutation_plan():
    """A plan may sort tokens as it likes (SVG2's clusters): results come back in the sequence's own order."""
    layout = marked_sequence(GRID)
    q, k, v, k_text, v_text = draw(layout.length)
    labels_q, labels_k = (torch.randint(3, (2, 4, layout.length)) for _ in range(2))
    keep = torch.rand(2, 4, 3, 3) < 0.6
    keep[..., 1] = True
    order_q, order_k = (x.argsort(dim=-1, stable=True).int() for x in (labels_q, labels_k))
    sizes_q, sizes_k = (torch.nn.functional.one_hot(x, 3).sum(2).int() for x in (labels_q, labels_k))
    plan = AttentionPlan.from_clusters(keep, sizes_q, sizes_k, order_q, order_k)
    mask = keep.gather(2, labels_q[..., None].expand(-1, -1, -1, 3)).gather(
        3, labels_k[:, :, None].expand(-1, -1, layout.length, -1)
    )
    gate = torch.randn(4)
    out = gated_attention(q, k, v, k_text, v_text, gate, plan)
    want = softmax_attention(q, k, v, mask) + gate.double().tanh()[:, None] * softmax_attention(q, k_text, v_text)
    torch.testing.assert_close(out.double(), want, atol=4e-6, rtol=1e-5)
    lines = out[:, layout.lines].double()
    torch.testing.assert_close(lines, want[:, layout.lines], atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("valid", [(9, 4), (1, 0)])
def test_padded_text_is_not_read(valid):
    q, k, v, k_text, v_text = draw(33)
    gate, length = torch.randn(4), torch.tensor(valid)
    out = gated_attention(q, k, v, k_text, v_text, gate, text_len=length)
    for item, count in enumerate(valid):
        own = vdit_fast.attention(q[item : item + 1], k[item : item + 1], v[item : item + 1])
        if count:
            own = gated_attention(
                *(x[item : item + 1] for x in (q, k, v)),
                *(x[item : item + 1, :count] for x in (k_text, v_text)),
                gate,
            )
        torch.testing.assert_close(out[item : item + 1], own, atol=2e-6, rtol=1e-5)
