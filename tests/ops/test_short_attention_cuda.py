"""short_attention on a CUDA device: against the CPU kernel and fp64, and what only a device can show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdit_fast.ops import short_attention
from vdit_fast.reference import short_attention as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same kernels"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, queries, keys, places, heads, dim
SHAPES = [
    (1, 25, 25, 1152, 5, 64),
    (2, 16, 16, 300, 8, 40),
    (1, 16, 16, 64, 8, 160),
    (1, 16, 16, 256, 16, 72),
    (3, 8, 33, 40, 2, 72),
    (2, 200, 64, 3, 2, 256),
    (1, 9, 49, 10, 2, 33),
    (1, 77, 1, 100, 4, 64),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    b, lq, lk, s, h, d = shape
    q, k, v = (torch.randn(b, n, s, h, d).to(dtype) for n in (lq, lk, lk))
    return q, k, v


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.cpu().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_on_a_cpu(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    q, k, v = draw(shape, dtype)
    truth = reference(q.double(), k.double(), v.double(), causal=causal)
    got = short_attention(q.cuda(), k.cuda(), v.cuda(), causal=causal)
    # the tensor cores take the weights in 16 bits, which a CPU keeps in 32
    allowed = 2 * error(short_attention(q, k, v, causal=causal), truth) + torch.finfo(dtype).eps
    assert error(got, truth) <= allowed
    assert torch.equal(got, short_attention(q.cuda(), k.cuda(), v.cuda(), causal=causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_counts(dtype: torch.dtype) -> None:
    q, k, v = (x.cuda() for x in draw((3, 16, 20, 50, 4, 64), dtype))
    kv_len = torch.tensor([20, 0, 7], device="cuda")
    want = short_attention(q, k, v, kv_len=kv_len)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(short_attention(*views, kv_len=kv_len), want)
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (q, k, v)]  # not at 16 bytes
    torch.testing.assert_close(short_attention(*shifted, kv_len=kv_len), want, rtol=2e-2, atol=2e-2)
    odd = [torch.cat((x, x), -1)[..., ::2] for x in (q, k, v)]
    halves = short_attention(*(x.contiguous() for x in odd), kv_len=kv_len)
    torch.testing.assert_close(short_attention(*odd, kv_len=kv_len), halves, rtol=2e-2, atol=2e-2)


def test_nothing_synchronises_and_graphs_capture() -> None:
    q, k, v = (x.cuda() for x in draw((2, 16, 16, 50, 4, 64), torch.bfloat16))
    kv_len = torch.tensor([16, 7], device="cuda")
    want = short_attention(q, k, v, causal=True, kv_len=kv_len)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        short_attention(q, k, v, causal=True, kv_len=kv_len)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = short_attention(q, k, v, causal=True, kv_len=kv_len)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_gradients() -> None:
    cpu = [x.requires_grad_() for x in draw((2, 9, 12, 5, 2, 16), torch.float32)]
    gpu = [x.detach().cuda().requires_grad_() for x in cpu]
    want = torch.autograd.grad(short_attention(*cpu, causal=True).square().sum(), cpu)
    got = torch.autograd.grad(short_attention(*gpu, causal=True).square().sum(), gpu)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)
