"""AV-DiT: Efficient Audio-Visual Diffusion Transformer for Joint Audio and Video Generation (arXiv 2406.07686).

A frozen image DiT runs frame by frame; temporal attention is added to it for video, adapters make it take audio tokens,
and a shared block attends over video and audio rows together, which are of unequal numbers.
"""

from __future__ import annotations

import copy

import pytest
import torch
from paper_checks import Operators, as_exact_as_torch, distance
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import vdit_fast

FRAMES, PLACES, AUDIO, WIDTH, HEADS = 5, 77, 53, 48, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("audio", [1, 53, 400])
def test_joint_rows_of_unequal_numbers(audio, dtype):
    video, sound = (torch.randn(3, 2, n, HEADS, 72).to(dtype) for n in (FRAMES * PLACES, audio))
    joint = torch.cat([video, sound], 2)
    as_exact_as_torch(vdit_fast.attention(*joint), *joint)
    for side, other in ((video, sound), (sound, video)):  # the other modality's rows stay where they are
        got = vdit_fast.attention(*side, segments=[tuple(other[1:])])
        as_exact_as_torch(got, side[0], *joint[1:])


def test_sound_of_different_lengths_in_a_batch():
    q, k, v = torch.randn(3, 2, FRAMES * PLACES + AUDIO, HEADS, 72).unbind()
    lengths = torch.tensor([FRAMES * PLACES + AUDIO, FRAMES * PLACES + 7])
    mask = (torch.arange(k.shape[1]) < lengths[:, None])[:, None, None]
    as_exact_as_torch(vdit_fast.attention(q, k, v, kv_len=lengths), q, k, v, mask)


class Attention(nn.Module):
    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        if zero:
            nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Adapter(nn.Module):
    """Bottleneck whose last layer begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


class ImageDiT(nn.Module):
    """The base: every frame on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, video: Tensor) -> Tensor:
        x = video.flatten(0, 1)
        for block in self.blocks:
            x = x + block(x)
        return x.unflatten(0, video.shape[:2])


class AVDiT(nn.Module):
    """A stand-in with the paper's attention shapes and random weights, on a base that it shares."""

    def __init__(self, base: ImageDiT) -> None:
        super().__init__()
        self.base = base
        self.temporal = nn.ModuleList(Attention(zero=True) for _ in base.blocks)
        self.adapters = nn.ModuleList(Adapter() for _ in base.blocks)
        self.joint = Attention(zero=True)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(video)
        for block, temporal, adapter in zip(self.base.blocks, self.temporal, self.adapters, strict=True):
            x = video.flatten(0, 1)
            x = (x + block(x)).unflatten(0, (batch, FRAMES)).transpose(1, 2).flatten(0, 1)
            video = (x + temporal(x)).unflatten(0, (batch, PLACES)).transpose(1, 2)
            audio = adapter(audio)
            audio = audio + block(audio)
        rows = torch.cat([video.flatten(1, 2), audio], 1)
        rows = rows + self.joint(rows)
        return rows[:, : FRAMES * PLACES].unflatten(1, (FRAMES, PLACES)), rows[:, FRAMES * PLACES :]


def models() -> tuple[ImageDiT, AVDiT, Tensor, Tensor]:
    base = ImageDiT()
    model = AVDiT(base).eval().requires_grad_(False)
    return base, model, torch.randn(2, FRAMES, PLACES, WIDTH), torch.randn(2, AUDIO, WIDTH)


def test_adapters_at_zero_are_the_base():
    """Temporal layers, adapters and joint block add exactly nothing, also where this package runs their attention."""
    base, model, video, audio = models()
    with vdit_fast.patch_sdpa(base):
        want = base(video)
    with vdit_fast.patch_sdpa(model) as handle, Operators() as operators:
        got, _ = model(video, audio)
    assert torch.equal(got, want)
    # per block: frames of 77 places, 5 frames of a place, 53 audio rows; then the joint rows
    assert handle.stats()["served"] == {"attention": 2 + 1, "short_attention": 2 + 2}
    assert not handle.stats()["passed"] and not operators.ran["torch"]


def test_trained_adapters():
    _, model, video, audio = models()
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    stock = model(video, audio)
    truth = copy.deepcopy(model).double()(video.double(), audio.double())
    with vdit_fast.patch_sdpa(model):
        got = model(video, audio)
    for mine, eager, exact in zip(got, stock, truth, strict=True):
        assert distance(mine, exact) <= 2 * distance(eager, exact) + torch.finfo(torch.float32).eps
    without, _ = AVDiT(model.base).requires_grad_(False)(video, audio)
    assert distance(without, got[0]) > 1e-2
