"""DyDiT's layers on a CUDA device: against the CPU, and that nobody waits for the host."""

from __future__ import annotations

import pytest
import torch

from vdit_fast.dynamic import DyDiTBlock, TokenSubset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; test_on_device runs the same path"),
]


@pytest.mark.parametrize("timesteps", [(0.3, 0.3), (0.3, 0.8)], ids=["one timestep", "two timesteps"])
@torch.no_grad()
def test_a_block_does_not_wait(timesteps: tuple[float, float]) -> None:
    block, embedding = DyDiTBlock(256, 4), torch.tensor(timesteps)[:, None] * torch.randn(256)
    head = block.token_selection.mlp_head[2]
    head.weight.copy_(head.weight.abs() * (1 - 2 * (torch.arange(16) % 2)))  # about half of the tokens
    block, embedding = block.bfloat16(), embedding.bfloat16()
    x, condition = torch.randn(2, 300, 256).bfloat16(), torch.randn(2, 256).bfloat16()
    want = block(x, condition, block.width(embedding))
    exact = block.float()(x.float(), condition.float(), block.width(embedding.float()))
    block = block.bfloat16().cuda()
    x, condition, embedding = x.cuda(), condition.cuda(), embedding.cuda()
    width = block.width(embedding)
    block(x, condition, width)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = block(x, condition, width)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # a near tie may select another token in 16 bits: compare those where both agree
    same = (got.cpu().float() - want.float()).abs().amax(-1) < 1
    assert same.float().mean() > 0.98
    error = [(t.float()[same] - exact[same]).norm() / exact[same].norm() for t in (got.cpu(), want)]
    assert error[0] <= 2 * error[1] + 1e-3
    assert torch.equal(got, block(x, condition, width))


@torch.no_grad()
def test_subsets_on_a_device() -> None:
    selected = torch.rand(3, 1000) < 0.4
    got, want = TokenSubset.of(selected.cuda()), TokenSubset.on_device(selected)
    assert got is not None and got.count is not None and want.count is not None
    assert torch.equal(got.rows.cpu(), want.rows) and torch.equal(got.slots.cpu(), want.slots)
    assert int(got.count) == int(want.count)
    x, gate = torch.randn(3, 1000, 72), torch.randn(3, 72)
    rows = got.gather(x.cuda())
    assert torch.equal(rows.cpu(), want.gather(x))
    torch.testing.assert_close(got.add(x.cuda(), rows, gate.cuda()).cpu(), want.add(x, want.gather(x), gate))
