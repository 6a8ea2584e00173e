"""ART·V: Auto-Regressive Text-to-Video Generation with Diffusion Models (arXiv 2311.18834).

One frame is made at a time; its queries read its own keys and those of earlier frames. So there are fewer queries than
keys, in heads of Stable Diffusion's widths, and at the beginning of a video some references are not there yet.
"""

from __future__ import annotations

import copy

import pytest
import torch
from paper_checks import Operators, as_exact_as_torch, distance
from torch import Tensor, nn

import vdit_fast

PLACES, HEADS = 63, 8


def frames(count: int, dim: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [batch, count, PLACES, HEADS, dim], the frame to make last."""
    return torch.randn(3, batch, count, PLACES, HEADS, dim).to(dtype).unbind()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 80, 160])
@pytest.mark.parametrize("references", [0, 1, 4])
def test_one_frame_reads_itself_and_its_references(references, dim, dtype):
    q, k, v = frames(1 + references, dim, dtype)
    query, keys, values = q[:, -1], k.flatten(1, 2), v.flatten(1, 2)  # a view: the batch's stride is the clip's
    assert references == 0 or not query.is_contiguous()
    got = vdit_fast.attention(query, keys, values)
    as_exact_as_torch(got, query, keys, values)
    together = vdit_fast.attention(q.flatten(1, 2), keys, values)  # what making all frames at once gives its rows
    assert distance(got, together[:, -PLACES:]) < 4 * torch.finfo(dtype).eps


def test_references_that_are_not_there_yet():
    """Items of a batch at different frames: own keys first, then the references that exist; the rest is never read."""
    _, k, v = frames(5, 40)
    query = torch.randn(2, PLACES, HEADS, 40)
    keys, values = k.flatten(1, 2), v.flatten(1, 2)
    present = torch.tensor([1 + 1, 1 + 4])
    got = vdit_fast.attention(query, keys, values, kv_len=present * PLACES)
    for item, count in enumerate(present.tolist()):
        alone = (x[item : item + 1, : count * PLACES] for x in (keys, values))
        as_exact_as_torch(got[item : item + 1], query[item : item + 1], *alone)
    keys[0, 2 * PLACES :] = values[0, 2 * PLACES :] = torch.nan
    assert torch.equal(vdit_fast.attention(query, keys, values, kv_len=present * PLACES), got)


def test_references_as_a_segment_need_no_copy():
    """Keys and values of earlier frames, kept where they are and shared by a batch, beside the frame's own."""
    q, k, v = frames(1, 80)
    _, *kept = frames(3, 80, batch=1)
    own = [x.flatten(1, 2) for x in (q, k, v)]
    earlier = [x.flatten(1, 2) for x in kept]
    got = vdit_fast.attention(*own, segments=[tuple(earlier)])
    joined = [torch.cat([x, y.expand(2, -1, -1, -1)], 1) for x, y in zip(own[1:], earlier, strict=True)]
    as_exact_as_torch(got, own[0], *joined)


class FrameByFrame(nn.Module):
    """A stand-in for the denoiser: a frame's rows read its own and its references', and a mask blends two noises."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.noise = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mask = nn.Linear(width, 1)

    def forward(self, frame: Tensor, references: Tensor, copied: Tensor) -> Tensor:
        q = self.to_q(frame).unflatten(-1, (3, -1)).transpose(1, 2)
        rows = torch.cat([frame, references.flatten(1, 2)], 1)
        k, v = self.to_kv(rows).unflatten(-1, (2, 3, -1)).permute(2, 0, 3, 1, 4)
        x = frame + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        mask = self.mask(x).sigmoid()
        return mask * self.noise(x) + (1 - mask) * copied


def test_a_video_frame_by_frame():
    """Every frame is made of all before it; the number of keys grows, the number of queries does not."""
    model = FrameByFrame().eval().requires_grad_(False)
    start, noises = torch.randn(1, 1, PLACES, 48), torch.randn(4, 1, PLACES, 48)

    def video(network: nn.Module, dtype: torch.dtype) -> Tensor:
        frames = start.to(dtype)
        for noise in noises.to(dtype):
            frames = torch.cat([frames, network(noise, frames, frames[:, -1])[:, None]], 1)
        return frames

    stock, truth = video(model, torch.float32), video(copy.deepcopy(model).double(), torch.float64)
    with vdit_fast.patch_sdpa(model) as handle, Operators() as operators:
        got = video(model, torch.float32)
    assert distance(got, truth) <= 2 * distance(stock, truth) + torch.finfo(torch.float32).eps
    assert handle.stats()["served"] == {"attention": 4} and not operators.ran["torch"]
