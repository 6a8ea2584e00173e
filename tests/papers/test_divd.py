"""DIVD: Deblurring with Improved Video Diffusion Model (arXiv 2412.00773).

Restoration keeps the size of its input: five frames of 45 x 80 latents, 23 x 40 a level below. No length is a multiple
of a tile, and frames are batch items of spatial attention.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from paper_checks import as_exact_as_torch

import vdit_fast
from vdit_fast.accelerate import accelerate

pytest.importorskip("diffusers")

FRAMES = 5


@pytest.mark.parametrize(("height", "width", "dim"), [(45, 80, 32), (23, 40, 64), (12, 20, 72), (6, 10, 40)])
def test_spatial_attention_of_every_level(height, width, dim):
    q, k, v = torch.randn(3, FRAMES, height * width, 1, dim).unbind()
    got = vdit_fast.attention(q, k, v)
    rows = torch.randperm(height * width)[:60]
    rows[:2] = torch.tensor([0, height * width - 1])  # the last row lies in a tail
    as_exact_as_torch(got[:, rows], q[:, rows], k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neighbours", [1, 3, 4])
def test_a_frame_reads_its_aligned_neighbours(neighbours, dtype):
    """Queries of one frame, keys of some others, taken out of a clip without a copy."""
    clip = torch.randn(FRAMES, 6 * 10, 3, 2, 40).to(dtype)  # frame, place, (q, k, v), head, column
    q = clip[2:3, :, 0]
    k, v = (clip[:neighbours, :, i].flatten(0, 1)[None] for i in (1, 2))
    assert not q.is_contiguous()
    as_exact_as_torch(vdit_fast.attention(q, k, v), q, k, v)


@pytest.mark.parametrize("grid", [(5, 9, 11), (1, 23, 5), (5, 1, 13)])
@pytest.mark.parametrize("family", ["wan_t2v", "wan_ti2v", "cogvideox_5b", "hunyuan_video"])
def test_models_of_odd_sizes(family, grid):
    model, inputs = tiny.build(family)
    inputs = tiny.regrid(inputs, grid)
    eager = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    handle = accelerate(model)
    tiny.exact_enough(tiny.run(model, inputs), eager, truth)
    assert all(layer["calls"] == 1 and not layer["fallbacks"] for layer in handle.stats()["layers"])
