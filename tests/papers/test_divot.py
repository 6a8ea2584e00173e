"""Divot: Diffusion Powers Video Tokenizer for Comprehension and Generation (arXiv 2412.04432).

The de-tokenizer is a denoiser that reads 64 to 256 representation tokens of a clip by cross-attention: keys and values
come from outside, and clips of a batch have different numbers of them.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from paper_checks import Operators, as_exact_as_torch, by_torch, distance
from torch import Tensor, nn

import vdit_fast

QUERIES, HEADS = 117, 5
COUNTS = (64, 77, 128, 256)


def draw(keys: int, dim: int = 64, dtype: torch.dtype = torch.float32, batch: int = 3):
    q = torch.randn(batch, QUERIES, HEADS, dim).to(dtype)
    k, v = torch.randn(2, batch, keys, HEADS, dim).to(dtype).unbind()
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", COUNTS)
def test_external_keys(keys, dtype):
    q, k, v = draw(keys, dtype=dtype)
    as_exact_as_torch(vdit_fast.attention(q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("keys", COUNTS)
def test_key_padding(keys, dim, dtype):
    q, k, v = draw(keys, dim, dtype)
    lengths = torch.tensor([keys, keys // 2 + 1, 1])
    mask = (torch.arange(keys) < lengths[:, None])[:, None, None]
    got = vdit_fast.attention(q, k, v, kv_len=lengths)
    as_exact_as_torch(got, q, k, v, mask)
    # what padding holds is never read
    k[2, 1:] = v[2, 1:] = math.nan
    assert torch.equal(vdit_fast.attention(q, k, v, kv_len=lengths), got)


def test_a_clip_without_tokens_adds_nothing():
    q, k, v = draw(64)
    got = vdit_fast.attention(q, k, v, kv_len=torch.tensor([64, 0, 64]))
    assert not got[1].any() and got[0].any()


def test_padding_anywhere_is_a_plan():
    """A mask whose padding is not at the end, as for clips whose tokens were dropped here and there."""
    q, k, v = draw(96)
    keep = torch.rand(3, 1, 1, 96) < 0.6
    plan = vdit_fast.AttentionPlan.from_mask(keep.expand(3, 1, QUERIES, 96), block=(32, 32))
    got = vdit_fast.attention(q, k, v, plan)
    as_exact_as_torch(got, q, k, v, keep)
    assert distance(got, by_torch(q, k, v)) > 0.1


def test_condition_tokens_learn():
    """The tokenizer is trained through the denoiser: gradients reach the external keys and values, none the padding."""
    q, k, v = (x.requires_grad_() for x in draw(64))
    lengths = torch.tensor([64, 20, 1])
    mask = (torch.arange(64) < lengths[:, None])[:, None, None]
    weight = torch.randn(3, QUERIES, HEADS, 64)
    got = torch.autograd.grad((vdit_fast.attention(q, k, v, kv_len=lengths) * weight).sum(), (q, k, v))
    want = torch.autograd.grad((by_torch(q, k, v, mask) * weight).sum(), (q, k, v))
    for mine, torchs in zip(got, want, strict=True):
        assert distance(mine, torchs) < 1e-5
    assert not got[1][1, 20:].any() and not got[2][1, 20:].any()


class Detokenizer(nn.Module):
    """A stand-in for the denoiser's conditioning: cross-attention to external tokens with a mask per clip."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.out = nn.Linear(32, 32), nn.Linear(24, 64), nn.Linear(32, 32)

    def forward(self, latents: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        q = self.to_q(latents).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = self.to_kv(tokens).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return latents + self.out(read.transpose(1, 2).flatten(2))


def test_a_denoiser_that_nobody_knows():
    model, latents = Detokenizer().eval().requires_grad_(False), torch.randn(3, QUERIES, 32)
    tokens, lengths = torch.randn(3, 77, 24), torch.tensor([77, 30, 1])
    mask = torch.arange(77) < lengths[:, None]
    stock = model(latents, tokens, mask)
    truth = copy.deepcopy(model).double()(latents.double(), tokens.double(), mask)
    with vdit_fast.patch_sdpa(model) as handle, Operators() as operators:
        got = model(latents, tokens, mask)
        assert handle.stats()["served"] == {"attention": 1} and not operators.ran["torch"]
        assert distance(got, truth) <= 2 * distance(stock, truth) + torch.finfo(torch.float32).eps
        model(latents, tokens, mask.flip(1))  # padding in front has no number of readable keys, and torch can do it
        assert handle.stats()["passed"] == {"attn_mask hides keys before readable ones": 1}
