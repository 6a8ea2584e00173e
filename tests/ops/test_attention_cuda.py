"""attention on a CUDA device: the cases of the emulated kernels, and what only a device can show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vdit_fast
from vdit_fast import AttentionPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "emulator"))

from cases import ALL, BF16, F16, Case, Problem, blocks, build, check, clusters  # the path is set above

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same cases"),
]


def run(p: Problem) -> tuple[Tensor, Tensor]:
    options = {name: o.cuda() if isinstance(o, Tensor) else o for name, o in p.options.items()}
    options["segments"] = [tuple(t.cuda() for t in pair) for pair in p.options["segments"]]
    q, k, v = (on_device(t) for t in (p.q, p.k, p.v))
    return vdit_fast.attention(q, k, v, p.plan.to("cuda") if p.plan else None, return_lse=True, **options)


def on_device(t: Tensor) -> Tensor:
    """A copy with the same strides."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    return out.copy_(t)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_case(case: Case) -> None:
    problem = build(case)
    first = run(problem)
    check(problem, *first)
    again = run(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case("large-dense", lq=2000, lk=3000, dim=128, heads=4),
        Case("large-clusters", clusters(40, 90), lq=3000, lk=4000, dim=128, batch=2, heads=3),
        Case("large-blocks", blocks(128, 128, p=0.3), lq=4096, lk=4096, heads=8, dtype=F16),
    ],
    ids=lambda c: c.name,
)
def test_large_case(case: Case) -> None:
    problem = build(case)
    check(problem, *run(problem))


def tensors(batch: int, length: int, heads: int, dim: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, length, heads, dim, device="cuda").to(dtype) for _ in range(3)]


def test_graph_capture_replays_with_new_contents() -> None:
    q, k, v = tensors(1, 500, 4, 128)
    mask = torch.rand(4, 8, 8, device="cuda") < 0.5
    plan = AttentionPlan.from_block_mask(mask, 64, 64, lq=500, lk=500)
    other = AttentionPlan.from_block_mask(~mask, 64, 64, lq=500, lk=500)
    kv_len = torch.tensor([400], dtype=torch.int32, device="cuda")
    vdit_fast.attention(q, k, v, plan, kv_len=kv_len)  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = vdit_fast.attention(q, k, v, plan, kv_len=kv_len, return_lse=True)
    for t in (q, k, v):
        t.copy_(torch.randn_like(t))
    kv_len.fill_(450)
    for name in ("tiles", "run_ptr", "runs"):
        getattr(plan, name).copy_(getattr(other, name))
    graph.replay()
    want, want_lse = vdit_fast.attention(q, k, v, other, kv_len=kv_len, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_side_stream() -> None:
    q, k, v = tensors(1, 4000, 8, 128)
    want = vdit_fast.attention(q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [torch.zeros_like(t) for t in (q, k, v)]
        for a, b in zip(late, (q, k, v), strict=True):
            a.copy_(b)
        out = vdit_fast.attention(*late)
    stream.synchronize()
    assert torch.equal(out, want)


def test_nothing_synchronises() -> None:
    q, k, v = tensors(2, 300, 4, 64)
    plan = AttentionPlan.from_block_mask(torch.rand(2, 4, 5, 5, device="cuda") < 0.5, 64, 64, lq=300, lk=300)
    kv_len = torch.tensor([200, 300], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        vdit_fast.attention(q, k, v, plan, kv_len=kv_len, segments=[(k[:, :9], v[:, :9])])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_heads_than_a_grid_dimension_holds() -> None:
    q, k, v = tensors(300, 5, 256, 64)  # 76,800 heads
    out = vdit_fast.attention(q, k, v)
    want = vdit_fast.reference.attention(*(t[-2:].cpu() for t in (q, k, v)))
    assert (out[-2:].cpu().float() - want.float()).norm() <= 5e-3 * want.float().norm()


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    heads, length = 40, 450_000  # 2.3e9 elements a tensor
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    q, k, v = (torch.empty(1, length, heads, 128, dtype=BF16, device="cuda").normal_() for _ in range(3))
    plan = AttentionPlan.block_causal([1000] * (length // 1000), window=1).to("cuda")
    out = vdit_fast.attention(q, k, v, plan)
    for at in (0, length // 2, length - 1000):
        rows = slice(at, at + 1000)
        want = vdit_fast.reference.attention(*(t[:, rows, -2:].float().cpu() for t in (q, k, v)))
        got = out[:, rows, -2:].float().cpu()
        assert (got - want).norm() <= 5e-3 * want.norm()


def test_bad_input_is_named() -> None:
    q, k, v = tensors(1, 70, 2, 64)
    plan = AttentionPlan.dense(70, 70)
    wide = torch.randn(1, 70, 2, 68, device="cuda", dtype=torch.float32).to(BF16)
    for message, call in (
        ("q is float32; the CUDA kernels take bfloat16", lambda: vdit_fast.attention(q.float(), k.float(), v.float())),
        ("multiple of 8", lambda: vdit_fast.attention(*(t[..., :60] for t in (q, k, v)))),
        (r"k has strides .* pass k.contiguous\(\)", lambda: vdit_fast.attention(q, wide[..., :64], v)),
        ("plan.tiles must be .* on cuda:0, got int32 on cpu", lambda: vdit_fast.attention(q, k, v, plan)),
        ("kv_len is int64 .* on cpu", lambda: vdit_fast.attention(q, k, v, kv_len=torch.tensor([3]))),
        ("v is on cpu but q is on cuda:0", lambda: vdit_fast.attention(q, k, v.cpu())),
        ("9 segments; at most 8", lambda: vdit_fast.attention(q, k, v, segments=[(k, v)] * 9)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
