"""score_lse and block_mass on a CUDA device: the cases of the emulated kernels, and what only a device can show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdit_fast.ops import block_mass, score_lse, softmax_mass

sys.path.insert(0, str(Path(__file__).parents[1] / "emulator"))

from mass_cases import (
    ALL,
    F16,
    MassCase,
    MassProblem,
    build,
    check_lse,
    check_mass,
    check_softmax,
)  # the path is set above

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same cases"),
]

LARGE = [
    MassCase("large", lq=3000, lk=4100, dim=128, heads=4, kv_heads=2, batch=2, q_block=128, kv_block=128),
    MassCase("large-64", lq=4096, lk=4096, heads=8, kv_heads=8, dtype=F16),
    MassCase("large-fold", lq=6000, lk=5000, dim=128, heads=3, kv_heads=3, fold=8, q_block=16, kv_block=16),
    MassCase("large-blocks", lq=3000, lk=3000, q_block=1000, kv_block=700),
]


def run(p: MassProblem) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t) for t in (p.q, p.k))
    with_q = {name: o.cuda() if isinstance(o, Tensor) else o for name, o in p.softmax_options.items()}
    options = {name: o for name, o in with_q.items() if name != "q_len"}
    blocks = p.case.q_block, p.case.kv_block
    mass = block_mass(q, k, p.lse.cuda(), *blocks, **options)
    return score_lse(q, k, **options), mass, softmax_mass(q, k, *blocks, **with_q)


@pytest.mark.parametrize("case", [*ALL, *LARGE], ids=lambda c: c.name)
def test_case(case: MassCase) -> None:
    problem = build(case)
    lse, mass, softmax = found = run(problem)
    check_lse(problem, lse)
    check_mass(problem, mass)
    check_softmax(problem, softmax)
    assert all(map(torch.equal, run(problem), found))


def tensors(tokens: int, heads: int = 4, batch: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, batch, tokens, heads, 64, device="cuda").bfloat16().unbind(0)


def test_nothing_synchronises() -> None:
    q, k = tensors(500, batch=2)
    kv_len = torch.tensor([200, 500], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_mass(q, k, score_lse(q, k, kv_len=kv_len), 64, 64, kv_len=kv_len)
        softmax_mass(q, k, 64, 64, q_len=kv_len, kv_len=kv_len)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture_replays_with_new_contents() -> None:
    q, k = tensors(700)
    block_mass(q, k, score_lse(q, k, fold=2), 8, 8, fold=2)  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mass = block_mass(q, k, score_lse(q, k, fold=2), 8, 8, fold=2)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(mass, block_mass(q, k, score_lse(q, k, fold=2), 8, 8, fold=2))


def test_more_heads_than_a_grid_dimension_holds() -> None:
    q, k = tensors(5, heads=256, batch=300)
    lse = score_lse(q, k)
    torch.testing.assert_close(lse[-1:].cpu(), score_lse(q[-1:].cpu(), k[-1:].cpu()), rtol=1e-5, atol=1e-5)
    rows = torch.full((300, 256, 1), 5.0, device="cuda")
    torch.testing.assert_close(block_mass(q, k, lse, 64, 64).sum(-1), rows, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k: (q.float(), k.float()), "q is float32; the CUDA kernels take bfloat16 and float16"),
        (lambda q, k: (q[..., :20], k[..., :20]), "head dim is 20; on CUDA it must be a multiple of 8"),
        (lambda q, k: (q[..., 4:60], k[..., 4:60]), r"q has strides .* pass q.contiguous\(\)"),
    ],
)
def test_refused_calls(change, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"score_lse: .*{message}"):
        score_lse(*change(*tensors(20)))
