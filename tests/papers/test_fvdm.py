"""FVDM: Redefining Temporal Modeling in Video Diffusion, The Vectorized Timestep Approach (arXiv 2410.03160).

A timestep per frame: spatial blocks, temporal blocks and the final layer are modulated by their frame's row. Latte's
layout: spatial blocks see [B F, p, C], temporal blocks [B p, F, C]; heads of 72 channels.
"""

from __future__ import annotations

import pytest
import torch

import vdit_fast
from vdit_fast.modulation import frame_rows, temporal_rows
from vdit_fast.ops import adaln_modulate, gate_residual

B, F, P, C = 2, 16, 6, 144  # two heads of 72
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def layer_norm(x):
    return torch.nn.functional.layer_norm(x.double(), x.shape[-1:], eps=1e-6)


def embedding(timesteps):
    """[..., C] sinusoids of timesteps [...]."""
    angles = timesteps[..., None] * torch.exp(-torch.arange(C // 2) / 12.0)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Block(torch.nn.Module):
    """One DiT block whose six modulation rows come from a table and an index, or one row per sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.qkv, self.out = (torch.nn.Linear(C, n * C) for n in (6, 3, 1))
        self.up, self.down = torch.nn.Linear(C, 2 * C), torch.nn.Linear(2 * C, C)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=C**-0.5)

    def forward(self, x, table, index=None):
        """x [b, n, C]; table [b, C], or [1, R, C] with index [b, n]."""
        rows = self.modulation(table).chunk(6, dim=-1)
        h = adaln_modulate(x, rows[1], rows[0], index=index)
        q, k, v = self.qkv(h).unflatten(2, (3, 2, 72)).unbind(2)
        x = gate_residual(x, self.out(vdit_fast.attention(q, k, v).flatten(2)), rows[2], index=index)
        h = adaln_modulate(x, rows[4], rows[3], index=index)
        return gate_residual(x, self.down(torch.nn.functional.gelu(self.up(h))), rows[5], index=index)

    def plain(self, x, rows):
        """The same in fp64 with a row for every token [b, n, C]."""
        weights = {name: p.double() for name, p in self.named_parameters()}

        def linear(name, y):
            return torch.nn.functional.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

        shift, scale, gate, shift2, scale2, gate2 = linear("modulation", rows.double()).chunk(6, dim=-1)
        x = x.double()
        q, k, v = linear("qkv", layer_norm(x) * (1 + scale) + shift).unflatten(2, (3, 2, 72)).unbind(2)
        weight = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 72**0.5).softmax(-1)
        x = x + gate * linear("out", torch.einsum("bhqk,bkhd->bqhd", weight, v).flatten(2))
        h = layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * linear("down", torch.nn.functional.gelu(linear("up", h)))


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(11)
    with torch.no_grad():
        yield


def spatial(block, x, table):
    """x, [B, F, P, C]: every frame is a sequence with a row of its own."""
    return block(x.flatten(0, 1), table.flatten(0, 1)).view(x.shape)


def temporal(block, x, table):
    """Every place is a sequence of F frames, whose rows differ inside it."""
    batch, frames, places, _ = x.shape
    index = temporal_rows(batch, frames, places)
    out = block(x.transpose(1, 2).flatten(0, 1), table.flatten(0, 1)[None], index)
    return out.view(batch, places, frames, -1).transpose(1, 2)


@pytest.mark.parametrize("run", [spatial, temporal])
def test_frames_are_modulated_by_their_own_timestep(run):
    block, x, table = Block(), torch.randn(B, F, P, C), embedding(torch.rand(B, F) * 1000)
    rows = table[:, :, None].expand(-1, -1, P, -1)
    if run is spatial:
        want = block.plain(x.flatten(0, 1), rows.flatten(0, 1)).view(x.shape)
    else:
        turned = [y.transpose(1, 2).flatten(0, 1) for y in (x, rows)]
        want = block.plain(*turned).view(B, P, F, C).transpose(1, 2)
    torch.testing.assert_close(run(block, x, table).double(), want, **TOLERANCE)
    assert (run(block, x, table[:, :1].expand(-1, F, -1).contiguous()).double() - want).abs().max() > 0.1


@pytest.mark.parametrize("run", [spatial, temporal])
def test_equal_timesteps_are_the_scalar_model(run):
    """N1a, bit for bit."""
    block, x = Block(), torch.randn(B, F, P, C)
    one = embedding(torch.tensor([731.0, 12.0]))
    table = one[:, None].expand(-1, F, -1).contiguous()
    if run is spatial:
        want = block(x.flatten(0, 1), one.repeat_interleave(F, dim=0)).view(x.shape)
    else:
        sequences = x.transpose(1, 2).flatten(0, 1)
        want = block(sequences, one.repeat_interleave(P, dim=0)).view(B, P, F, C).transpose(1, 2)
    got = run(block, x, table)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)  # the linear layer sees another batch
    shift, scale = table.chunk(2, dim=-1)
    rows = (torch.cat((scale, scale), -1), torch.cat((shift, shift), -1))
    flat = x.flatten(1, 2)
    many = adaln_modulate(flat, *rows, index=frame_rows((F, 1, P)))
    assert torch.equal(many, adaln_modulate(flat, *(y[:, 0] for y in rows)))


def test_frames_may_be_permuted():
    """N1b: modulation and spatial attention do not know the order of frames; with permuted timesteps nor do temporal
    blocks, which have no positions here."""
    order = torch.randperm(F)
    block, x, table = Block(), torch.randn(B, F, P, C), embedding(torch.rand(B, F) * 1000)
    for run in (spatial, temporal):
        got, want = run(block, x[:, order], table[:, order]), run(block, x, table)[:, order]
        torch.testing.assert_close(got, want, **TOLERANCE)


def test_final_layer():
    x, table = torch.randn(B, F * P, C), embedding(torch.rand(B, F) * 1000)
    scale, shift = (torch.randn(2, B, F, C) + table).unbind(0)
    got = adaln_modulate(x, scale, shift, index=frame_rows((F, 2, P // 2)))
    rows = [y.repeat_interleave(P, dim=1).double() for y in (scale, shift)]
    torch.testing.assert_close(got.double(), layer_norm(x) * (1 + rows[0]) + rows[1], **TOLERANCE)


def test_clean_condition_frames_stay_what_they_are():
    """Windows of 16 frames with 8 clean ones at t = 0: the sampler leaves those untouched, bit for bit, and their rows
    do not depend on the others' timesteps."""
    block, x = Block(), torch.randn(B, F, P, C)
    timesteps = torch.full((B, F), 600.0)
    timesteps[:, :8] = 0
    later = timesteps.clone()
    later[:, 8:] = 300
    first, second = (spatial(block, x, embedding(t)) for t in (timesteps, later))
    assert torch.equal(first[:, :8], second[:, :8]) and not torch.equal(first[:, 8:], second[:, 8:])
    step = torch.where(timesteps > 0, 0.1, 0.0)[..., None]
    latents = torch.randn(B, F, 4)
    moved = gate_residual(
        latents, torch.randn(B, F, 4), step.expand(-1, -1, 4).contiguous(), index=frame_rows((F, 1, 1))
    )
    assert torch.equal(moved[:, :8], latents[:, :8]) and not torch.equal(moved[:, 8:], latents[:, 8:])
