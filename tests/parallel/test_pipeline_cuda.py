"""The stage pipeline on a GPU: one rank under NCCL. Several GPUs are not needed, and not tested."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from long_video import SHAPE, prompt, tiny_wan, unipc

import vdit_fast
from vdit_fast.parallel import SchedulerSampler, StagePipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL"),
]


def draw(model, device):
    model = copy.deepcopy(model).to(device)
    arguments = {name: x.to(device) for name, x in prompt().items()}
    with vdit_fast.accelerate(model, "exact") as handle:
        pipeline = StagePipeline(handle, release=True)
        settings = {"blocks": 3, "num_per_block": 4, "num_cat": 2, "guidance": 3.0}
        video = dict(pipeline.generate(SchedulerSampler(unipc(4)), SHAPE, arguments, **settings))
        assert pipeline.expected() == {"sent": [0, 0], "received": [0, 0]}
        pipeline.close()
    return video


def test_one_rank_under_nccl(tmp_path):
    """The same clip as without a process group, bit for bit, and the CPU's up to rounding."""
    model = tiny_wan()
    alone, on_cpu = draw(model, "cuda"), draw(model, "cpu")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        got = draw(model, "cuda")
    finally:
        dist.destroy_process_group()
    for index, block in got.items():
        assert torch.equal(block, alone[index])
        torch.testing.assert_close(block.cpu(), on_cpu[index], atol=5e-3, rtol=5e-3)
