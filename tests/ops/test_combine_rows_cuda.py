"""combine_rows and grouped experts on a CUDA device: against the CPU, and that nobody waits for the host."""

from __future__ import annotations

import pytest
import torch
from combine_cases import DTYPES, check, draw
from torch import Tensor

from vdit_fast import ops
from vdit_fast.dynamic import GroupedExperts
from vdit_fast.dynamic.grouped import grouped_linear, has_grouped_gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same kernel"),
]


def on_device(**kwargs: Tensor) -> Tensor:
    return ops.combine_rows(**{name: x.cuda() for name, x in kwargs.items()}).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [13, 1152, 5120])
def test_as_on_a_cpu(dim: int, dtype: torch.dtype) -> None:
    for parts in range(16):
        check(on_device, draw(dim, dtype, (1, 2, 5, 8)[parts % 4], parts, rows=3000, seed=parts))


def test_slots_outside_count_for_nothing() -> None:
    kwargs = draw(40, torch.float32, 2, 15)
    kwargs["slots"][::2, 1] = 2**31 - 1
    want = kwargs["slots"].clone()
    want[::2, 1] = -1
    assert torch.equal(on_device(**kwargs), on_device(**kwargs | {"slots": want}))


@torch.no_grad()
def test_grouped_experts_do_not_wait() -> None:
    torch.manual_seed(0)
    layer = GroupedExperts(256, 1024, 8, 2, shared_hidden=512, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 700, 256, device="cuda", dtype=torch.bfloat16)
    assert has_grouped_gemm(x[0], layer.gate_up)
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = layer(x), layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    exact = GroupedExperts.from_layer(layer).double().cpu()
    # the same choice of experts, everything else in fp64
    from vdit_fast.dynamic import route
    from vdit_fast.reference import combine_rows

    flat = x.reshape(-1, 256)
    experts, weights = (t.cpu() for t in route(layer.gate(flat), 2))
    rows = flat.double().cpu()
    want = torch.zeros_like(rows)
    for e in range(8):
        gate, up = (rows @ exact.gate_up[e].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ exact.down[e].T
        want += out * (weights.double() * (experts == e)).sum(1, keepdim=True)
    want = combine_rows(want, torch.arange(len(want), dtype=torch.int32)[:, None], base=exact.shared_experts(rows))
    assert float((first.cpu().double().view(want.shape) - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("counts", [[40, 0, 24], [0, 0, 64], [16, 16, 0]])
def test_grouped_products(counts: list[int]) -> None:
    x, weight = torch.randn(64, 32).bfloat16().cuda(), torch.randn(3, 48, 32).bfloat16().cuda()
    number = torch.tensor(counts, dtype=torch.int32)
    got, want = grouped_linear(x, weight, number.cuda()).cpu(), grouped_linear(x.cpu(), weight.cpu(), number)
    used = sum(counts)
    torch.testing.assert_close(got[:used], want[:used], atol=0.1, rtol=0.02)
