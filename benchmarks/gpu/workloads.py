"""Inputs, plan and expected answers of a problem. The expectation never looks at the plan."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_fast import AttentionPlan
from vdit_fast.cli.bench import Shape, random_block_mask

from .problems import Problem


@dataclass
class Workload:
    """Tensors [1, L, H, D] and who reads whom."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttentionPlan | None = None
    keep: Tensor | None = None  # bool [H, query blocks, key blocks]
    sizes: tuple[Tensor, Tensor] | None = None  # [H, query blocks], [H, key blocks]
    orders: tuple[Tensor, Tensor] | None = None  # [H, L] each; clusters only
    plan_ms: float = 0.0
    density: float = 1.0  # pairs that are read
    starts: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.sizes is not None:
            self.starts = (self.sizes[0].cumsum(1), self.sizes[1].cumsum(1))


def build(problem: Problem, dtype: torch.dtype, device: str, seed: int = 0) -> Workload:
    """Random inputs (the same for the same seed and device) and the problem's plan."""
    torch.manual_seed(seed)
    shape = (1, problem.length, problem.heads, problem.dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    w = Workload(problem, q, k, v)
    generator = torch.Generator().manual_seed(seed)
    if problem.kind in ("blocks", "stand-ins"):
        grid = Shape(1, problem.heads, problem.length, problem.dim)
        w.keep = random_block_mask(grid, problem.density, problem.block, generator).to(device)
        sizes = torch.full((problem.heads, w.keep.shape[1]), problem.block)
        sizes[:, -1] = problem.length - problem.block * (w.keep.shape[1] - 1)
        w.sizes = (sizes.to(device), sizes.to(device))
    elif problem.kind == "clusters":
        w.keep, w.sizes, w.orders = _clusters(problem, generator, device)
    if w.keep is not None:
        w.plan = _plan(w)  # warm-up
        _wait(device)
        start = time.perf_counter()
        w.plan = _plan(w)
        _wait(device)
        w.plan_ms = (time.perf_counter() - start) * 1e3
        w.density = pairs(w) / (problem.heads * problem.length**2)
    w.__post_init__()
    return w


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _plan(w: Workload) -> AttentionPlan:
    p = w.problem
    assert w.keep is not None and w.sizes is not None
    if w.orders is not None:
        lengths = [s[None].int() for s in w.sizes]
        return AttentionPlan.from_clusters(w.keep[None], *lengths, *(o[None].int() for o in w.orders))
    return AttentionPlan.from_block_mask(
        w.keep, p.block, p.block, lq=p.length, lk=p.length, compensate=p.kind == "stand-ins"
    )


def _clusters(
    p: Problem, generator: torch.Generator, device: str
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Exponentially distributed sizes that fill the length, a random share of pairs, random members."""
    sizes = []
    for count in p.clusters:
        weight = -torch.log1p(-torch.rand(p.heads, count, generator=generator, dtype=torch.float64)) + 1e-9
        edges = (weight.cumsum(1) / weight.sum(1, keepdim=True) * p.length).round().long()
        edges[:, -1] = p.length
        sizes.append(torch.diff(edges, dim=1, prepend=edges.new_zeros(p.heads, 1)).to(device))
    keep = torch.rand(p.heads, *p.clusters, generator=generator) < p.density
    orders = [torch.rand(p.heads, p.length, generator=generator).argsort(1).to(device) for _ in range(2)]
    return keep.to(device), (sizes[0], sizes[1]), (orders[0], orders[1])


def pairs(w: Workload) -> float:
    """Query-key pairs that are read; stand-ins do not count."""
    assert w.keep is not None and w.sizes is not None
    rows, columns = (s.double() for s in w.sizes)
    return float(torch.einsum("hi,hij,hj->", rows, w.keep.double(), columns))


# ---- expected answers


def allowed(w: Workload, head: int, rows: Tensor) -> Tensor:
    """bool [rows, L] in the original token order: which keys the rows of this head read."""
    p = w.problem
    if w.keep is None or w.sizes is None:
        return torch.ones(len(rows), p.length, dtype=torch.bool, device=rows.device)
    if w.orders is None:
        block, place = rows // p.block, None
    else:
        position = torch.empty_like(w.orders[0][head])
        position[w.orders[0][head]] = torch.arange(p.length, device=rows.device)
        block = torch.searchsorted(w.starts[0][head], position[rows], right=True)
        place = w.orders[1][head]
    read = w.keep[head, block].repeat_interleave(w.sizes[1][head], dim=1)
    if place is None:
        return read
    return torch.zeros_like(read).index_copy_(1, place, read)


def expected(w: Workload, head: int, rows: Tensor) -> Tensor:
    """Output rows in fp64, [rows, D]."""
    p = w.problem
    q, k, v = (t[0, :, head].double() for t in (w.q, w.k, w.v))
    score = q[rows] @ k.T * p.dim**-0.5
    score.masked_fill_(~allowed(w, head, rows), -torch.inf)
    if p.kind == "stand-ins":
        assert w.keep is not None and w.sizes is not None
        n = w.sizes[1][head]
        block = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
        mean_k, mean_v = (torch.zeros(len(n), p.dim, device=k.device).double() for _ in range(2))
        mean_k.index_add_(0, block, k).div_(n[:, None])
        mean_v.index_add_(0, block, v).div_(n[:, None])
        extra = q[rows] @ mean_k.T * p.dim**-0.5 + n.double().log()
        extra.masked_fill_(w.keep[head, rows // p.block], -torch.inf)
        score, v = torch.cat([score, extra], 1), torch.cat([v, mean_v])
    return torch.nan_to_num(score.softmax(1)) @ v  # a row that reads nothing is 0


def sampled_rows(w: Workload, heads: int = 4, rows: int = 16, seed: int = 1) -> list[tuple[int, Tensor]]:
    """(head, rows) pairs: some heads, some rows of each, always the first and the last."""
    p, g = w.problem, torch.Generator().manual_seed(seed)
    picked = []
    for i in range(min(heads, p.heads)):
        head = i * (p.heads - 1) // max(1, min(heads, p.heads) - 1)
        some = torch.randint(p.length, (rows,), generator=g)
        some[0], some[-1] = 0, p.length - 1
        picked.append((head, some.to(w.q.device)))
    return picked


def relative_error(w: Workload, out: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖ over the sampled rows of ``out`` [1, L, H, D]; infinite if it is not finite."""
    wrong, norm = 0.0, 0.0
    for head, rows in sampled_rows(w):
        want = expected(w, head, rows)
        wrong += float((out[0, rows, head].double() - want).square().sum())
        norm += float(want.square().sum())
    return math.sqrt(wrong / norm) if math.isfinite(wrong) else math.inf


def expected_gradients(w: Workload, head: int, grad: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of one head in fp32, [L, D] each; stand-ins are not supported."""
    p = w.problem
    q, k, v, d_out = (t[0, :, head].float() for t in (w.q, w.k, w.v, grad))
    d_q, d_k, d_v = (torch.zeros_like(t) for t in (q, k, v))
    for start in range(0, p.length, chunk):
        rows = torch.arange(start, min(start + chunk, p.length), device=q.device)
        score = (q[rows] @ k.T * p.dim**-0.5).masked_fill_(~allowed(w, head, rows), -torch.inf)
        weight = torch.nan_to_num(score.softmax(1))
        d_v += weight.T @ d_out[rows]
        d_weight = d_out[rows] @ v.T
        d_score = weight * (d_weight - (weight * d_weight).sum(1, keepdim=True)) * p.dim**-0.5
        d_q[rows] = d_score @ k
        d_k += d_score.T @ q[rows]
    return d_q, d_k, d_v


def gradient_error(w: Workload, grad: Tensor, found: tuple[Tensor, ...]) -> float:
    """The largest of the three relative errors, for the last head."""
    head = w.problem.heads - 1
    errors = [
        float((got[0, :, head].float() - want).norm() / want.norm())
        for got, want in zip(found, expected_gradients(w, head, grad), strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
