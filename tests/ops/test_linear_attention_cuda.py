"""Linear attention on a CUDA device: against the CPU kernel and fp64, and what only a device can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import (
    BF16,
    CASES,
    F32,
    LinearCase,
    build,
    check_out,
    check_state,
    eager_readout,
    eager_state,
    no_worse,
    widened,
)  # fmt: skip
from torch import Tensor

from vdit_fast import reference
from vdit_fast.ops import linear_attention, linear_attention_readout, linear_attention_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same kernels"),
]


def moved(options: dict[str, object]) -> dict[str, object]:
    return {n: x.cuda() if isinstance(x, Tensor) else x for n, x in options.items()}


def moved_back(options: dict[str, object]) -> dict[str, object]:
    return {n: x.cpu() if isinstance(x, Tensor) else x for n, x in options.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_as_exact_as_torch(case: LinearCase) -> None:
    problem = build(case)
    q, k, v = (x.cuda() for x in (problem.q, problem.k, problem.v))
    state = linear_attention_state(k, v, **moved(problem.state_options))
    check_state(problem, state.cpu())
    out = linear_attention_readout(q, state, **moved(problem.readout_options))
    check_out(problem, out.cpu())
    assert torch.equal(linear_attention(q, k, v, **moved(problem.options)), out)


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
def test_layouts_survive_the_move(layout: str) -> None:
    """``.cuda()`` makes dense copies: the same views are made again on the device."""
    problem = build(LinearCase("layout", layout=layout, heads=1, kv_heads=1))
    q, k, v = (x.cuda() for x in (problem.q, problem.k, problem.v))
    if layout == "sliced":
        views = [torch.cat((x, x), -1)[..., : x.shape[-1]] for x in (q, k, v)]
    else:
        views = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (q, k, v)]
    check_out(problem, linear_attention(*views, **moved(problem.options)).cpu())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_long_sequences(dtype: torch.dtype) -> None:
    """Many parts and many CTAs, on sampled rows; twice the same bits."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 75_600, 3, 128, device="cuda").to(dtype) for _ in range(3))
    weight = 1.5 * 128**-0.5 * torch.randn(3, 128, 128, device="cuda")
    out = linear_attention(q, k, v, q_weight=weight, k_weight=weight)
    assert torch.equal(out, linear_attention(q, k, v, q_weight=weight, k_weight=weight))
    state = reference.linear_attention_state(k.double(), v.double(), weight=weight.double())
    rows = torch.arange(0, 75_600, 1009, device="cuda")
    want = reference.linear_attention_readout(q[:, rows].double(), state, weight=weight.double())
    options = {"feature_map": "hedgehog", "weight": weight, "k_den": None, "q_den": None, "kv_len": None}
    twin_state = eager_state(*(x.cpu() for x in (k, v)), moved_back(options))
    no_worse(out[:, rows].cpu(), eager_readout(q[:, rows].cpu(), twin_state, moved_back(options)), want.cpu())
    parts = [linear_attention_state(k[:, s], v[:, s], weight=weight) for s in (slice(0, 999), slice(999, None))]
    for part in (slice(None, -1), slice(-1, None)):
        no_worse(sum(parts).cpu()[..., part], twin_state[..., part], state.cpu()[..., part])


def test_nothing_synchronises_and_graphs_capture() -> None:
    q, k, v = (torch.randn(2, 300, 4, 64, device="cuda").to(BF16) for _ in range(3))
    kv_len = torch.tensor([300, 7], device="cuda")
    want = linear_attention(q, k, v, kv_len=kv_len)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_attention(q, k, v, kv_len=kv_len)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_attention(q, k, v, kv_len=kv_len)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_gradients() -> None:
    problem = build(LinearCase("gradients", dtype=F32, dim=16, dim_v=16))
    inputs = problem.q, problem.k, problem.v

    def gradients(function: Any, tensors: list[Tensor], options: dict[str, object]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves, **options).square().sum(), leaves)

    got = gradients(linear_attention, [x.cuda() for x in inputs], moved(problem.options))
    twin = gradients(reference.linear_attention, list(inputs), problem.options)
    want = gradients(reference.linear_attention, [x.double() for x in inputs], widened(problem.options))
    for name, *three in zip("qkv", got, twin, want, strict=True):
        no_worse(three[0].cpu(), three[1], three[2], name)
