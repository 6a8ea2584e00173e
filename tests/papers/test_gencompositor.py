"""GenCompositor: Generative Video Compositing with Diffusion Transformer (arXiv 2509.02460).

Rows [text | video | foreground] in one sequence; the extended rotary embedding gives the foreground positions of its
own, from a table of doubled height, and the foreground's outputs are dropped.
"""

from __future__ import annotations

import pytest
import torch

import vdit_fast
from vdit_fast.positions import extended_ids, frequencies, grid_ids, rope_tables

WIDTHS = (8, 12, 12)  # of a head of 32


def tables(ids, layout="interleaved"):
    return rope_tables(ids, [frequencies(width) for width in WIDTHS], layout)


def rotate(x, cos, sin):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


def sequence(grid, text=6, heads=2):
    """q, k, v [1, text + 2 N, heads, 32]; RoPE where ids are."""
    frames, height, width = grid
    return torch.randn(3, 1, text + 2 * frames * height * width, heads, 32).unbind(0), text


def with_positions(q, k, text, ids):
    cos, sin = tables(ids)
    return (torch.cat((x[:, :text], rotate(x[:, text:], cos, sin)), dim=1) for x in (q, k))


@pytest.mark.parametrize("grid", [(4, 3, 4), (6, 2, 5), (2, 1, 1)])
def test_the_checkpoints_order(grid):
    """E1d, E1e: the tall table flattened frame by frame, rows handed to [video; foreground]; even numbers of frames."""
    frames, height, width = grid
    ids = extended_ids(grid, frame_major=True).tolist()
    n = frames * height * width
    for token, (f, h, w) in enumerate(grid_ids(grid).tolist()):
        assert ids[token] == [f // 2, h + height * (f % 2), w]
        assert ids[n + token] == [frames // 2 + f // 2, h + height * (f % 2), w]


def test_thirteen_frames_of_the_checkpoint_meet_in_the_middle_of_one():
    ids = extended_ids((13, 30, 45), frame_major=True)
    assert len(ids) == 35_100 and ids[17_549].tolist() == [6, 29, 44] and ids[17_550].tolist() == [6, 30, 0]


def test_the_papers_order_keeps_the_video_and_sets_the_foreground_apart():
    grid = (3, 4, 5)
    video, foreground = extended_ids(grid).view(2, -1, 3)
    own = grid_ids(grid)
    assert torch.equal(video, own) and torch.equal(foreground, own + torch.tensor([0, 4, 0]))
    assert len(extended_ids(grid).unique(dim=0)) == 2 * len(own)
    for got, want in zip(tables(video), tables(own), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("frame_major", [False, True])
def test_attention_over_the_three_parts(frame_major):
    grid = (2, 3, 4)
    (q, k, v), text = sequence(grid)
    turned_q, turned_k = with_positions(q, k, text, extended_ids(grid, frame_major=frame_major))
    out = vdit_fast.attention(turned_q, turned_k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", turned_q.double(), turned_k.double()) / 32**0.5
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    stock_q, stock_k = with_positions(q, k, text, torch.cat((grid_ids(grid), grid_ids(grid))))
    assert (vdit_fast.attention(stock_q, stock_k, v) - out).abs().max() > 1e-2


def test_dropped_rows_need_not_be_computed():
    grid = (2, 3, 4)
    (q, k, v), text = sequence(grid)
    q, k = with_positions(q, k, text, extended_ids(grid))
    kept = text + 24
    torch.testing.assert_close(
        vdit_fast.attention(q[:, :kept], k, v), vdit_fast.attention(q, k, v)[:, :kept], atol=1e-6, rtol=1e-5
    )


def test_the_same_ids_and_rows_for_both_streams_are_the_stock_video():
    """Every key twice changes no softmax, and a common offset of the ids no score (E1a)."""
    grid = (2, 3, 4)
    (q, k, v), _ = sequence(grid, text=0)
    twice = [torch.cat((x[:, :24], x[:, :24]), dim=1) for x in (q, k, v)]
    turned = list(with_positions(*twice[:2], 0, torch.cat((grid_ids(grid), grid_ids(grid)))))
    own = list(with_positions(q[:, :24], k[:, :24], 0, grid_ids(grid, start=(5, -2, 9))))
    torch.testing.assert_close(
        vdit_fast.attention(*turned, twice[2])[:, :24], vdit_fast.attention(*own, v[:, :24]), atol=4e-6, rtol=1e-5
    )


@pytest.mark.parametrize("frame_major", [False, True])
def test_a_served_cogvideox_takes_the_table(frame_major):
    """[text | video | foreground] through the real class: the foreground's frames follow the video's."""
    pytest.importorskip("diffusers")
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(5)
    grid = (3, 4, 6)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=2, sample_width=12, sample_height=8, sample_frames=21, max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": 3 * torch.randn(1, 6, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    extended = tables(extended_ids(grid, frame_major=frame_major))
    stock = tables(grid_ids((6, 4, 6)))
    with torch.no_grad():
        want = model(**inputs, image_rotary_emb=extended)[0]
        handle = vdit_fast.accelerate(model)
        handle.positions(lambda step, geometry, own: extended)
        got = model(**inputs, image_rotary_emb=stock)[0]
        handle.positions(None)
        plain = model(**inputs, image_rotary_emb=stock)[0]
    assert (got - want).norm() < 2e-6 * want.norm()
    assert (plain - want).norm() > 1e-4 * want.norm()
