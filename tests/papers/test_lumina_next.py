"""Lumina-Next: Making Lumina-T2X Stronger and Faster with Next-DiT (arXiv 2406.18583).

RoPE per axis with frequencies that follow the flow time, a softmax scale that follows the length, grouped heads, norms
on both sides of a branch with a tanh gate, and Context Drop. Oracles: definitions, and diffusers' own block.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import vdit_fast
from vdit_fast.ops import adaln_modulate, gate_residual, gated_attention, pooled_attention
from vdit_fast.positions import (
    frequencies,
    frequency_aware,
    grid_ids,
    interpolated,
    ntk,
    proportional_scale,
    rope_tables,
    time_aware,
)


def softmax_attention(q, k, v, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())


def test_factor_one_changes_nothing():
    own = rope_tables(grid_ids((3, 4, 5)), [frequencies(w) for w in (8, 12, 12)])
    for t in (0.0, 0.25, 1.0):
        for options in ({}, {"watershed": 0.3}, {"head_dim": 32}):
            axes = [time_aware(w, 10000.0, 1.0, t, **options) for w in (8, 12, 12)]
            for got, want in zip(rope_tables(grid_ids((3, 4, 5)), axes), own, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("t", [0.1, 0.29, 0.3, 0.9])
def test_watershed_of_the_released_sampler(t):
    """Tables for a grid of twice the trained side: linear factor before t = 0.3, NTK factor from then on."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    linear, ntk_factor = (2.0, 1.0) if t < 0.3 else (1.0, 2.0)
    want = get_1d_rotary_pos_embed(36, 40, linear_factor=linear, ntk_factor=ntk_factor)
    cos, sin = rope_tables(grid_ids((40,)), [time_aware(36, 10000.0, 2.0, t, watershed=0.3)], "compact")
    torch.testing.assert_close(torch.complex(cos, sin), want, atol=5e-6, rtol=0)


def test_time_goes_from_interpolation_to_ntk():
    slow = [frequencies(48) / time_aware(48, 10000.0, 2.0, t, head_dim=96) for t in (0.0, 0.05, 0.2, 1.0)]
    assert all((a >= b - 1e-12).all() and (a > b + 1e-3).any() for a, b in itertools.pairwise(slow))
    torch.testing.assert_close(slow[0][1:], torch.full((23,), 2.0, dtype=torch.float64), atol=0, rtol=1e-12)
    torch.testing.assert_close(slow[-1], frequencies(48) / ntk(48, 10000.0, 2.0), atol=0, rtol=1e-12)


def test_frequency_aware_meets_interpolation_at_the_trained_length():
    scaled = frequency_aware(64, 10000.0, 2.0, 256)
    seen = 2 * math.pi / frequencies(64) < 256
    torch.testing.assert_close(scaled[~seen], interpolated(64, 10000.0, 2.0)[~seen], atol=0, rtol=1e-12)
    assert scaled[0] == 1 and (scaled[seen] > interpolated(64, 10000.0, 2.0)[seen]).all()


def test_a_served_model_changes_its_frequencies_with_the_step():
    """Wan's class on twice its grid: interpolated positions while there is much noise, NTK ones afterwards."""
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    torch.manual_seed(4)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": 3 * torch.randn(1, 4, 2, 8, 16),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "return_dict": False,
    }

    def scaled(t, grid):
        axes = [frequencies(8), *(time_aware(8, 10000.0, 2.0, t, watershed=0.3) for _ in range(2))]
        cos, sin = rope_tables(grid_ids(grid), axes)
        return cos[None, :, None], sin[None, :, None]

    def run(sigma):
        with torch.no_grad():
            return model(**inputs, timestep=torch.tensor([1000 * sigma]))[0]

    sigmas, stock, want = (0.9, 0.75, 0.65, 0.1), [], []
    for sigma in sigmas:
        stock.append(run(sigma))
        hook = model.rope.register_forward_hook(lambda *_, sigma=sigma: scaled(1 - sigma, (2, 4, 8)))
        want.append(run(sigma))
        hook.remove()
    handle = vdit_fast.accelerate(model)
    handle.positions(lambda step, geometry, tables: scaled(1 - step.sigma, geometry.grid))
    for sigma, own, other in zip(sigmas, stock, want, strict=True):
        assert (run(sigma) - other).norm() < 5e-6 * other.norm()
        assert (own - other).norm() > 1e-4 * other.norm()


def test_proportional_attention():
    q, k, v = torch.randn(3, 1, 64, 4, 16).unbind(0)
    text = torch.randn(2, 1, 5, 4, 16)
    assert proportional_scale(16, 16, 16) == pytest.approx(1 / 4, rel=1e-15)
    scale = proportional_scale(64, 16, 16)
    assert scale == pytest.approx(math.sqrt(1.5 / 16), rel=1e-15)
    got = gated_attention(q, k, v, *text, torch.zeros(4), scale=scale)
    torch.testing.assert_close(got.double(), softmax_attention(q, k, v, scale), atol=2e-6, rtol=1e-5)


def test_grouped_heads_are_repeated_heads():
    """32 query heads share 8 key/value heads."""
    q, k, v = torch.randn(1, 40, 32, 24), torch.randn(1, 40, 8, 24), torch.randn(1, 40, 8, 24)
    k_text, v_text, gate = torch.randn(1, 6, 8, 24), torch.randn(1, 6, 8, 24), torch.randn(32)
    repeated = [x.repeat_interleave(4, dim=2) for x in (k, v, k_text, v_text)]
    torch.testing.assert_close(
        gated_attention(q, k, v, k_text, v_text, gate), gated_attention(q, *repeated, gate), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sandwich_norm_with_a_tanh_gate(dtype):
    """x + tanh(gate) RMS2(f(RMS1(x) (1 + scale))): scale only, no shift; gate 0 is the identity."""
    x, branch = torch.randn(2, 17, 48, dtype=dtype), torch.randn(2, 17, 48, dtype=dtype)
    first, second = (1 + torch.randn(2, 48) / 9).to(dtype)
    scale, gate = torch.randn(2, 2, 48, dtype=dtype).unbind(0)

    def rms(y, weight):
        y = y.double()
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    tolerance = {"atol": 4e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2**-7}
    got = adaln_modulate(x, scale, norm="rms", eps=1e-5, weight=first)
    torch.testing.assert_close(got.double(), rms(x, first) * (1 + scale.double()[:, None]), **tolerance)
    options = {"gate_activation": "tanh", "post_norm": "rms", "post_eps": 1e-5, "post_weight": second}
    got = gate_residual(x, branch, gate, **options)
    want = x.double() + gate.double().tanh()[:, None] * rms(branch, second)
    torch.testing.assert_close(got.double(), want, **tolerance)
    assert torch.equal(gate_residual(x, branch, torch.zeros_like(gate), **options), x)


def served_block(block, x, temb, text, text_len, tables):
    """A Next-DiT block by this package's operators, with the weights of diffusers' block."""
    norm, attn, text_attn = block.norm1, block.attn1, block.attn2
    scale, gate, scale_mlp, gate_mlp = norm.linear(norm.silu(temb)).chunk(4, dim=1)
    h = adaln_modulate(x, scale, norm="rms", eps=norm.norm.eps, weight=norm.norm.weight)

    def heads(y):
        return y.unflatten(2, (-1, block.head_dim))

    def rotate(y):
        even, odd = y[..., 0::2], y[..., 1::2]
        cos, sin = (t[:, None] for t in tables)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    context = block.norm1_context(text)
    q, k = (rotate(heads(n(p(h)))) for n, p in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k)))
    # Text queries have a projection and a norm of their own in diffusers' form, as two modules.
    q_text = rotate(heads(text_attn.norm_q(text_attn.to_q(h))))
    k_text, v_text = heads(text_attn.norm_k(text_attn.to_k(context))), heads(text_attn.to_v(context))
    assert torch.equal(q, q_text)  # tied in this test, as in the authors' code
    mixed = gated_attention(q, k, heads(attn.to_v(h)), k_text, v_text, block.gate, text_len=text_len)
    post = {"gate_activation": "tanh", "post_norm": "rms"}
    x = gate_residual(
        x, text_attn.to_out[0](mixed.flatten(2)), gate, **post,
        post_eps=block.norm2.eps, post_weight=block.norm2.weight,
    )  # fmt: skip
    h = adaln_modulate(x, scale_mlp, norm="rms", eps=block.ffn_norm1.eps, weight=block.ffn_norm1.weight)
    return gate_residual(
        x, block.feed_forward(h), gate_mlp, **post,
        post_eps=block.ffn_norm2.eps, post_weight=block.ffn_norm2.weight,
    )  # fmt: skip


def test_a_whole_block_is_the_model_familys_own():
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock

    torch.manual_seed(2)
    block = LuminaNextDiTBlock(64, 4, 2, 32, None, 1e-5, True, 24).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        block.attn2.to_q.weight.copy_(block.attn1.to_q.weight)
        block.attn2.norm_q.load_state_dict(block.attn1.norm_q.state_dict())
    height, width = 5, 7
    x, temb, text = torch.randn(2, 35, 64), torch.randn(2, 64), torch.randn(2, 6, 24)
    text_len = torch.tensor([6, 4])
    mask = torch.arange(6) < text_len[:, None]
    factor, t = 1.5, 0.2
    stock = get_2d_rotary_pos_embed_lumina(16, height, width, linear_factor=factor)  # below the watershed
    # The family's channels alternate between the axes: pair (h, w) of every frequency.
    axes = [time_aware(8, 10000.0, factor, t, watershed=0.3)] * 2
    tables = tuple(
        table.unflatten(1, (2, 4)).mT.flatten(1) for table in rope_tables(grid_ids((height, width)), axes, "compact")
    )
    torch.testing.assert_close(torch.complex(*tables), stock.flatten(0, 1), atol=1e-6, rtol=0)
    with torch.no_grad():
        want = block(x, torch.ones(2, 35), stock.flatten(0, 1)[None], text, mask, temb, cross_attention_kwargs={})
        truth = block.double()(
            x.double(), torch.ones(2, 35), stock.flatten(0, 1)[None], text.double(), mask, temb.double(),
            cross_attention_kwargs={},
        )  # fmt: skip
        got = served_block(block.float(), x, temb, text, text_len, tables)
    error, eager = ((y.double() - truth).norm() / truth.norm() for y in (got, want))
    assert error <= 2 * eager + torch.finfo(torch.float32).eps, (error, eager)


def test_context_drop_is_exact_for_keys_that_agree():
    """C1: K and V constant in every 2 x 2 cell."""
    rows = (torch.arange(6)[:, None] // 2 * 4 + torch.arange(8) // 2).flatten()
    q, (k, v) = torch.randn(1, 48, 4, 16), torch.randn(2, 1, 12, 4, 16)[:, :, rows]
    got = pooled_attention(q, k, v, (1, 6, 8), (1, 2, 2))
    torch.testing.assert_close(got, vdit_fast.attention(q, k, v), atol=2e-6, rtol=1e-5)


def test_context_drop_reads_a_quarter_of_the_keys():
    q, k, v = torch.randn(3, 1, 48, 4, 16).unbind(0)
    pooled = [x.view(1, 3, 2, 4, 2, 4, 16).double().mean((2, 4)).flatten(1, 2) for x in (k, v)]
    got = pooled_attention(q, k, v, (1, 6, 8), (1, 2, 2))
    torch.testing.assert_close(got.double(), softmax_attention(q, *pooled, 1 / 4), atol=2e-6, rtol=1e-5)
    assert (got - vdit_fast.attention(q, k, v)).abs().max() > 1e-2
