"""Align your Latents (VideoLDM): High-Resolution Video Synthesis with Latent Diffusion Models (arXiv 2304.08818).

Temporal layers are put between the layers of an image model and mixed in by a learned alpha: x <- alpha x + (1 - alpha)
temporal(x). With alpha = 1 the video model is the image model, frame by frame.
"""

from __future__ import annotations

import copy

import pytest
import torch
from paper_checks import Operators, as_exact_as_torch, distance
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import vdit_fast

WIDTH, HEADS, PLACES = 32, 2, 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("frames", [8, 12, 16])
def test_temporal_lengths(frames, dim, dtype):
    """Tokens come from spatial layers as [batch · frames, places, ...]: a view of them is attended to along frames."""
    tokens = torch.randn(2 * frames, PLACES, 3, HEADS, dim).to(dtype)
    q, k, v = tokens.unflatten(0, (2, frames)).unbind(3)
    got = vdit_fast.short_attention(q, k, v)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (got, q, k, v)]
    as_exact_as_torch(*rows)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ImageLayers(nn.Module):
    """A stand-in for the image model: residual self-attention over the places of a frame, random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention() for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = images + layer(images)
        return images


class VideoLayers(nn.Module):
    """The image model with a temporal layer behind every layer: attention and a convolution over frames."""

    def __init__(self, image: ImageLayers, alpha: float) -> None:
        super().__init__()
        self.image = image
        self.temporal = nn.ModuleList(SelfAttention() for _ in image.layers)
        self.convolution = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in image.layers)
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def forward(self, video: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        for layer, temporal, convolution in zip(self.image.layers, self.temporal, self.convolution, strict=True):
            x = video.flatten(0, 1)
            x = (x + layer(x)).unflatten(0, (batch, frames))
            along = x.transpose(1, 2).flatten(0, 1)  # [batch · places, frames, width]
            along = along + temporal(along)
            along = along + convolution(along.mT).mT
            mixed = along.unflatten(0, (batch, PLACES)).transpose(1, 2)
            video = self.alpha * x + (1 - self.alpha) * mixed
        return video


def models(alpha: float) -> tuple[ImageLayers, VideoLayers, Tensor]:
    image = ImageLayers()
    video = VideoLayers(image, alpha).eval().requires_grad_(False)
    return image, video, torch.randn(2, 8, PLACES, WIDTH)


def test_alpha_one_is_the_image_model_per_frame():
    image, model, video = models(1.0)
    with vdit_fast.patch_sdpa(image):
        want = torch.stack([image(frame) for frame in video.unbind(1)], 1)
    with vdit_fast.patch_sdpa(model) as handle, Operators() as operators:
        got = model(video)
    assert torch.equal(got, want)
    assert handle.stats()["served"] == {"attention": 3, "short_attention": 3} and not handle.stats()["passed"]
    assert not operators.ran["torch"]


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_mixed_temporal_layers(alpha):
    image, model, video = models(alpha)
    stock, truth = model(video), copy.deepcopy(model).double()(video.double())
    with vdit_fast.patch_sdpa(model):
        got = model(video)
    assert distance(got, truth) <= 2 * distance(stock, truth) + torch.finfo(torch.float32).eps
    assert distance(image(video.flatten(0, 1)).unflatten(0, video.shape[:2]), got) > 0.05
    assert torch.equal(model(video), stock)
