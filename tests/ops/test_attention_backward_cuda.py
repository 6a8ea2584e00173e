"""Gradients of attention on a CUDA device: the cases of the emulated kernels, and what only a device can show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vdit_fast
from vdit_fast import AttentionPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "emulator"))

from cases import ALL, BF16, F16, Case, Problem, blocks, build, clusters, loose_runs  # the path is set above
from gradients import KERNEL_DIM, Solution, check_gradients, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same cases"),
]


def on_device(t: Tensor) -> Tensor:
    """A leaf with the same strides."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    return out.copy_(t).requires_grad_()


def run(p: Problem, s: Solution) -> dict[str, Tensor]:
    """Forward and backward of the package; gradients by name."""
    options = {name: o.cuda() if isinstance(o, Tensor) else o for name, o in p.options.items()}
    segments = [tuple(on_device(t) for t in pair) for pair in p.options["segments"]]
    options["segments"] = segments
    q, k, v = (on_device(t) for t in (p.q, p.k, p.v))
    out, lse = vdit_fast.attention(q, k, v, p.plan.to("cuda") if p.plan else None, return_lse=True, **options)
    outputs, grads = [out], [s.dout.cuda()]
    if s.dlse is not None:
        outputs.append(lse)
        grads.append(s.dlse.cuda())
    leaves = {"dq": q, "dk": k, "dv": v}
    for i, pair in enumerate(segments):
        leaves |= {f"segment {i} d{n}": t for n, t in zip("kv", pair, strict=True)}
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True))


@pytest.mark.parametrize("number", range(len(ALL)), ids=[case.name for case in ALL])
def test_case(number: int) -> None:
    case = ALL[number]
    problem = build(case)
    solution = solve(problem, with_dlse=number % 2 == 0)
    if case.dim > KERNEL_DIM:
        with pytest.raises(RuntimeError, match=f"attention_backward: head dim is {case.dim}; .* up to {KERNEL_DIM}"):
            run(problem, solution)
        return
    first = run(problem, solution)
    check_gradients(problem, solution, first)
    again = run(problem, solution)
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize(
    "case",
    [
        Case("large-dense", lq=2000, lk=3000, dim=128, heads=4),
        Case("large-clusters", clusters(40, 90), lq=3000, lk=4000, dim=128, batch=2, heads=3),
        Case("large-blocks", blocks(128, 128, p=0.3), lq=4096, lk=4096, heads=8, dtype=F16),
        Case("large-runs", loose_runs(ordered=True), lq=3000, lk=3000, dim=96, heads=4, kv_heads=2),
    ],
    ids=lambda c: c.name,
)
def test_large_case(case: Case) -> None:
    problem = build(case)
    solution = solve(problem, with_dlse=True)
    check_gradients(problem, solution, run(problem, solution))


def tensors(batch: int, length: int, heads: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, length, heads, dim, device="cuda").to(BF16).requires_grad_() for _ in range(3)]


def test_gradient_of_a_sum_has_strides_of_zero() -> None:
    q, k, v = tensors(1, 200, 2, 64)
    grads = torch.autograd.grad(vdit_fast.attention(q, k, v).sum(), (q, k, v))
    out = vdit_fast.attention(q, k, v)
    want = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_graph_capture_replays_with_new_contents() -> None:
    q, k, v = tensors(1, 500, 4, 128)
    mask = torch.rand(4, 8, 8, device="cuda") < 0.5
    plan = AttentionPlan.from_block_mask(mask, 64, 64, lq=500, lk=500)
    dout = torch.randn_like(q)
    out = vdit_fast.attention(q, k, v, plan)
    torch.autograd.grad(out, (q, k, v), dout)  # loads the kernels before the capture
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = vdit_fast.attention(q, k, v, plan)
        grads = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        for t in (q, k, v, dout):
            t.copy_(torch.randn_like(t))
    graph.replay()
    want = torch.autograd.grad(vdit_fast.attention(q, k, v, plan), (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_nothing_synchronises() -> None:
    q, k, v = tensors(2, 300, 4, 64)
    plan = AttentionPlan.from_block_mask(torch.rand(2, 4, 5, 5, device="cuda") < 0.5, 64, 64, lq=300, lk=300)
    segments = [(k[:1, :9].detach().requires_grad_(), v[:1, :9].detach().requires_grad_())]
    dout = torch.randn_like(q)
    out = vdit_fast.attention(q, k, v, plan, segments=segments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(out, (q, k, v, *segments[0]), dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_heads_than_a_grid_dimension_holds() -> None:
    q, k, v = tensors(300, 5, 256, 64)  # 76,800 heads
    dout = torch.randn_like(q)
    got = torch.autograd.grad(vdit_fast.attention(q, k, v), (q, k, v), dout)
    last = [t[-2:].detach().cpu().float().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(vdit_fast.reference.attention(*last), last, dout[-2:].cpu().float())
    for a, b in zip(got, want, strict=True):
        assert (a[-2:].cpu().float() - b).norm() <= 5e-3 * b.norm()
