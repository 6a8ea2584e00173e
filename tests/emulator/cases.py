"""Problems that every attention kernel must solve: a declarative table, their fp64 answers, and the comparison.

Shared by the emulated kernels (tests/emulator) and the tests on a CUDA device (tests/ops).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from vdit_fast import AttentionPlan, reference

BF16, F16 = torch.bfloat16, torch.float16
LENGTHS = (1, 40, 63, 64, 65, 127, 128, 129, 300)
DIMS = (40, 64, 72, 80, 96, 112, 128, 160, 256)


@dataclass(frozen=True)
class Case:
    """One problem; everything random in it follows from its name."""

    name: str
    plan: Callable[[Case, torch.Generator], AttentionPlan | None] | None = None
    lq: int = 130
    lk: int = 150
    dim: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int = 0  # 0: as many as heads
    dtype: torch.dtype = BF16
    scale: float | None = None
    row_scale: bool = False
    kv_len: tuple[int, ...] | None = None
    kv_len_dtype: torch.dtype = torch.int32
    segments: tuple[tuple[int, int], ...] = ()  # (batch, keys)
    stride: str = "plain"
    magnitude: float = 1.0  # of q
    nan_unread: bool = False  # keys that nobody reads hold NaN
    splits: int = 0


@dataclass
class Problem:
    """Tensors of a case, its call, and what must come out (fp64)."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttentionPlan | None
    options: dict[str, object]  # keyword arguments of vdit_fast.attention
    mask: Tensor  # [B, H, Lq, keys with segments]
    out: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    torch_error: float = field(init=False)  # relative error of torch's own path in the same dtype


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values behind other strides; rows stay 16-byte aligned."""
    if kind == "heads_first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        return torch.cat([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], 3)[
            ..., t.shape[3] : 2 * t.shape[3]
        ]
    if kind == "every_other":
        return torch.stack([t, torch.full_like(t, torch.nan)], 2).flatten(1, 2)[:, ::2]
    return t


def build(case: Case) -> Problem:
    """Tensors, plan and expected result of a case."""
    g = torch.Generator().manual_seed(sum(map(ord, case.name)) * 7919 + len(case.name))
    kv_heads = case.kv_heads or case.heads

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(case.dtype)

    q = (rand(case.batch, case.lq, case.heads, case.dim).float() * case.magnitude).to(case.dtype)
    k, v = (rand(case.batch, case.lk, kv_heads, case.dim) for _ in range(2))
    plan = case.plan(case, g) if case.plan else None
    options: dict[str, object] = {"scale": case.scale}
    if case.row_scale:
        options["row_scale"] = torch.rand(case.batch, case.heads, case.lq, generator=g) + 0.5
    if case.kv_len is not None:
        options["kv_len"] = torch.tensor(case.kv_len, dtype=case.kv_len_dtype)
    segments = [tuple(rand(b, n, kv_heads, case.dim) for _ in range(2)) for b, n in case.segments]
    options["segments"] = segments
    if plan is not None:
        plan.validate()

    shape = (case.batch, case.heads, case.lq)
    mask = torch.ones(*shape, case.lk, dtype=torch.bool) if plan is None else plan.to_mask().expand(*shape, -1)
    if case.kv_len is not None:
        mask = mask & (torch.arange(case.lk) < torch.tensor(case.kv_len)[:, None, None, None])
    problem = Problem(case, q, k, v, plan, options, mask)
    _solve(problem)
    if case.nan_unread:
        read = mask.view(case.batch, kv_heads, -1, case.lk).any(2).transpose(1, 2)
        for t in (k, v):
            t.masked_fill_(~read[..., None], torch.nan)
    problem.q, problem.k, problem.v = (strided(t, case.stride) for t in (q, k, v))
    return problem


def _solve(p: Problem) -> None:
    case, segments = p.case, p.options["segments"]
    wide = dict(p.options, segments=[tuple(t.double() for t in s) for s in segments])
    p.out, p.lse = reference.attention(p.q.double(), p.k.double(), p.v.double(), p.plan, return_lse=True, **wide)
    keys, values = (
        torch.cat([t, *(s[i].expand(case.batch, -1, -1, -1) for s in segments)], 1)
        .repeat_interleave(case.heads // t.shape[2], 2)
        .transpose(1, 2)
        for i, t in enumerate((p.k, p.v))
    )
    extra = p.mask.new_ones(*p.mask.shape[:3], keys.shape[2] - case.lk)
    mask = torch.cat([p.mask, extra], -1)
    plain = torch.nn.functional.scaled_dot_product_attention(
        p.q.transpose(1, 2), keys, values, attn_mask=mask, scale=case.scale
    ).transpose(1, 2)
    if case.row_scale:
        plain = (plain.float() * p.options["row_scale"].transpose(1, 2)[..., None]).to(case.dtype)
    rows = mask.any(-1).transpose(1, 2)[..., None]  # torch gives NaN to empty rows
    error = torch.where(rows, plain.double() - p.out, 0).norm()
    p.torch_error = float(error / p.out.norm()) if p.out.norm() > 0 else 0.0


def check(p: Problem, out: Tensor, lse: Tensor) -> None:
    """Compare a kernel's result with the fp64 answer; AssertionError with the numbers otherwise."""
    out, lse = out.cpu(), lse.cpu()
    assert out.dtype == p.case.dtype and out.shape == p.out.shape
    empty = p.lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), "lse: -inf in other places than the empty rows"
    assert not out.transpose(1, 2)[empty].any(), "empty rows are not 0"
    assert out.isfinite().all(), f"{int((~out.isfinite()).sum())} elements of out are not finite"
    norm = float(p.out.norm())
    if norm > 0:
        error = float((out.double() - p.out).norm()) / norm
        ulp = 2.0**-9 if p.case.dtype == BF16 else 2.0**-12  # half a unit in the last place of 1
        limit = max(min(5e-3 if p.case.dtype == BF16 else 7e-4, 2 * p.torch_error), 0.5 * ulp)
        assert error <= limit, f"relative error of out {error:.2e}, limit {limit:.2e}, torch {p.torch_error:.2e}"
    gap = (lse.double() - p.lse)[~empty].abs()
    allowed = 4e-6 * p.lse[~empty].abs().clamp(min=1)  # fp32 of the running maximum and of the scale
    assert (gap <= allowed).all(), f"lse is off by {gap.max():.2e}, {(gap / allowed).max():.1f} times what is allowed"


# ---- plans


def coin(g: torch.Generator, *shape: int, p: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=g) < p


def pieces(g: torch.Generator, total: int, count: int) -> Tensor:
    """``count`` lengths, zeros among them, that add up to ``total``."""
    cuts = torch.randint(0, total + 1, (count - 1,), generator=g).sort().values
    return torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]))


def orders(g: torch.Generator, batch: int, heads: int, n: int) -> Tensor:
    rows = [torch.randperm(n, generator=g) for _ in range(batch * heads)]
    return torch.stack(rows).view(batch, heads, n).int()


def dense(c: Case, g: torch.Generator) -> AttentionPlan:
    return AttentionPlan.dense(c.lq, c.lk)


def blocks(q_block: int, kv_block: int, *, batch: bool = True, heads: bool = True, p: float = 0.5):
    """A coin per pair of blocks, which may be the same for all heads or batch items."""

    def make(c: Case, g: torch.Generator) -> AttentionPlan:
        shape = (c.batch if batch else 1, c.heads if heads else 1, -(-c.lq // q_block), -(-c.lk // kv_block))
        return AttentionPlan.from_block_mask(coin(g, *shape, p=p), q_block, kv_block, lq=c.lq, lk=c.lk)

    return make


def clusters(count_q: int, count_k: int, *, batch: bool = True, heads: bool = True):
    """Uneven and empty clusters of scattered tokens."""

    def make(c: Case, g: torch.Generator) -> AttentionPlan:
        b, h = c.batch if batch else 1, c.heads if heads else 1
        q_sizes, k_sizes = (
            torch.stack([pieces(g, n, count) for _ in range(b * h)]).view(b, h, count)
            for n, count in ((c.lq, count_q), (c.lk, count_k))
        )
        q_order, kv_order = orders(g, b, h, c.lq), orders(g, b, h, c.lk)
        return AttentionPlan.from_clusters(coin(g, b, h, count_q, count_k), q_sizes, k_sizes, q_order, kv_order)

    return make


def masked(block: tuple[int, int], *, p: float = 0.3, band: int = 0, heads: bool = False):
    def make(c: Case, g: torch.Generator) -> AttentionPlan:
        mask = coin(g, c.batch, c.heads if heads else 1, c.lq, c.lk, p=p)
        if band:
            mask |= (torch.arange(c.lq)[:, None] - torch.arange(c.lk)).abs() <= band
        return AttentionPlan.from_mask(mask, block=block)

    return make


def windows(mode: str, text: int = 0):
    def make(c: Case, g: torch.Generator) -> AttentionPlan:
        shift = (0, 1, 2) if mode == "partition" else (0, 0, 0)
        return AttentionPlan.windows3d((2, 6, 10), (2, 4, 4), tile=(1, 3, 4), shift=shift, mode=mode, text=text)

    return make


def causal(c: Case, g: torch.Generator) -> AttentionPlan:
    return AttentionPlan.block_causal(pieces(g, c.lq, 5).tolist(), window=2, sinks=1)


def classes(c: Case, g: torch.Generator) -> AttentionPlan:
    return AttentionPlan.from_classes(coin(g, 3, 3), torch.randint(0, 3, (c.batch, c.lq), generator=g))


def loose_runs(*, longest: int = 200, most: int = 4, covered: bool = False, ordered: bool = False, none: float = 0.2):
    """Tiles of any length with gaps between them, runs of 1 to ``longest`` keys anywhere, unused capacity."""

    def make(c: Case, g: torch.Generator) -> AttentionPlan:
        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=g))

        tiles: list[list[int]] = []
        lists: list[list[list[int]]] = []
        for bh in range(c.batch * c.heads):
            ends = sorted({0, c.lq, *(draw(0, c.lq) for _ in range(4))})
            for start, end in pairwise(ends):
                if not covered and draw(0, 3) == 0:
                    continue
                runs, at = [], 0
                if float(torch.rand((), generator=g)) >= none:
                    for _ in range(draw(1, most)):
                        at += draw(1, max(1, c.lk // most))
                        length = min(draw(1, longest), c.lk - at)
                        if length < 1:
                            break
                        runs.append([at, length, -1])
                        at += length
                tiles.append([bh, start, end - start])
                lists.append(runs)
        by_work = sorted(range(len(tiles)), key=lambda i: -sum(run[1] for run in lists[i]))
        tiles, lists = [tiles[i] for i in by_work], [lists[i] for i in by_work]
        tiles.append([0, 0, 0])  # unused capacity
        lists.append([])
        counts = torch.tensor([0, *(len(runs) for runs in lists)])
        flat = [run for runs in lists for run in runs] + [[0, 0, -1]] * 3
        order = (orders(g, 1, c.heads, n) for n in (c.lq, c.lk))
        return AttentionPlan(
            c.batch,
            c.heads,
            c.lq,
            c.lk,
            torch.tensor(tiles, dtype=torch.int32),
            counts.cumsum(0).int(),
            torch.tensor(flat, dtype=torch.int32),
            None,
            *(order if ordered else ()),
        )

    return make


def no_tiles(c: Case, g: torch.Generator) -> AttentionPlan:
    empty = torch.zeros(0, 3, dtype=torch.int32)
    return AttentionPlan(1, 1, c.lq, c.lk, empty, torch.zeros(1, dtype=torch.int32), empty)


# ---- the table

_SHAPES = [(lq, 65) for lq in LENGTHS] + [(65, lk) for lk in LENGTHS] + [(1, 300), (300, 1), (128, 128), (300, 300)]
SHAPES = [
    Case(f"dense-{lq}x{lk}", lq=lq, lk=lk, heads=1, dim=DIMS[i % len(DIMS)], dtype=(BF16, F16)[i % 2])
    for i, (lq, lk) in enumerate(_SHAPES)
] + [
    Case(f"dim-{dim}-{str(dtype)[6:]}", dense, lq=70, lk=140, dim=dim, dtype=dtype, heads=1, segments=((1, 9),))
    for dim in DIMS
    for dtype in (BF16, F16)
]

PLANS = [
    Case("plan-dense", dense, batch=2),
    Case("blocks-64", blocks(64, 64), lq=200, lk=300),
    Case("blocks-ragged", blocks(48, 20), batch=2, dim=128),
    Case("blocks-all-heads", blocks(40, 33, heads=False), heads=3, batch=2),
    Case("blocks-all-batch", blocks(40, 33, batch=False), heads=3, batch=2),
    Case("blocks-one-plan", blocks(40, 33, batch=False, heads=False), heads=3, batch=2),
    Case("blocks-tiny", blocks(16, 3, p=0.4), lk=290, dim=96),
    Case("clusters", clusters(5, 7), batch=2, lk=300),
    Case("clusters-128", clusters(4, 5), dim=128, lq=300, lk=300, dtype=F16),
    Case("clusters-256", clusters(3, 6), dim=256, lq=90, heads=1),
    Case("clusters-one-plan", clusters(4, 6, batch=False, heads=False), batch=2, heads=3),
    Case("clusters-all-heads", clusters(4, 6, heads=False), batch=2, heads=2),
    Case("mask", masked((64, 64)), batch=2),
    Case("mask-ragged", masked((32, 48)), lk=161, dim=128),
    Case("mask-band", masked((16, 24), p=0.0, band=10), lq=150, dtype=F16),
    Case("mask-heads-256", masked((70, 100), heads=True), dim=256, lk=101),
    Case("mask-band-tall", masked((64, 64), p=0.0, band=10), lq=150),
    Case("mask-sparse", masked((64, 64), p=0.02), dtype=F16),
    Case("mask-tall", masked((100, 48)), dtype=F16),
    Case("mask-wide", masked((40, 300)), lk=290),
    Case("windows", windows("sliding", 13), lq=133, lk=133),
    Case("partition", windows("partition"), lq=120, lk=120, dim=72),
    Case("causal", causal, lq=200, lk=200),
    Case("classes", classes, batch=2, lk=130),
    Case("union", lambda c, g: blocks(64, 64)(c, g) | blocks(64, 64)(c, g), lq=200, lk=200),
    Case("runs", loose_runs(), batch=2, lk=300),
    Case("runs-covered", loose_runs(covered=True), lk=300, dim=128),
    Case("runs-ordered", loose_runs(ordered=True), batch=2, lk=300, dtype=F16),
    Case("runs-short", loose_runs(longest=3, most=90, none=0.0), lk=300, lq=200, heads=1),
    Case("runs-single-keys", loose_runs(longest=1, most=100, none=0.0, covered=True), lk=300, dim=128, heads=1),
    Case("no-tiles", no_tiles),
]

OPTIONS = [
    Case("segments", blocks(64, 64), segments=((1, 5), (2, 77)), batch=2),
    Case("segments-dense", segments=((1, 33), (1, 64), (1, 1)), dim=128),
    Case("segments-uncovered", loose_runs(), segments=((2, 40),), batch=2, lk=200),
    Case("segments-no-tiles", no_tiles, segments=((1, 70),), row_scale=True),
    Case("segments-empty", blocks(64, 64), segments=((1, 0), (1, 20))),
    Case("segments-ordered", clusters(5, 7), segments=((1, 40),), kv_len=(90,)),
    Case("segments-256", clusters(5, 7), segments=((1, 40), (1, 3)), dim=160, heads=1),
    Case("segments-eight", dense, segments=((1, 7),) * 8, heads=1),
    Case("row-scale", blocks(64, 64), row_scale=True, batch=2),
    Case("row-scale-uncovered", loose_runs(ordered=True), row_scale=True),
    Case("kv-len", kv_len=(0, 1, 150), batch=3),
    Case("kv-len-64", dense, kv_len=(64, 127), batch=2, kv_len_dtype=torch.int64),
    Case("kv-len-runs", loose_runs(), kv_len=(99, 200), batch=2, lk=300),
    Case("kv-len-ordered", clusters(5, 7), kv_len=(99, 200), batch=2, lk=300),
    Case("kv-len-mask", masked((64, 64), p=0.8), kv_len=(70,)),
    Case("gqa", blocks(64, 64), heads=4, kv_heads=2),
    Case("gqa-3", clusters(4, 4), heads=3, kv_heads=1, batch=2, segments=((1, 9),)),
    Case("scale", scale=0.3, segments=((1, 20),)),
    Case("scale-negative", blocks(64, 64), scale=-0.2),
    Case("scale-negative-256", scale=-0.1, dim=256, lq=65, lk=90),
    Case("scale-zero", masked((64, 64)), scale=0.0),
    Case("huge-scores", blocks(64, 64), magnitude=300.0),
    Case("huge-scores-f16", clusters(4, 4), magnitude=300.0, dtype=F16, dim=128),
    Case("heads-first", blocks(64, 64), stride="heads_first", batch=2),
    Case("sliced", clusters(4, 4), stride="sliced", batch=2, dim=72),
    Case("every-other-row", loose_runs(), stride="every_other", batch=2),
    Case("nan-blocks", blocks(64, 37, p=0.3, heads=False), nan_unread=True),
    Case("nan-clusters", clusters(3, 9, heads=False), nan_unread=True, lk=300),
    Case("nan-runs", loose_runs(), nan_unread=True, heads=1, lk=300),
    Case("nan-kv-len", kv_len=(70, 0), batch=2, nan_unread=True),
    Case("nan-kv-len-ordered", clusters(3, 9), kv_len=(110, 20), batch=2, nan_unread=True, lk=200),
    Case("nan-kv-len-mask", masked((64, 64), p=0.8), kv_len=(70,), nan_unread=True),
    Case("nan-tail", lq=20, lk=10, nan_unread=True, segments=((1, 3),)),
]

SPLITS = [
    Case("split-auto", lq=1, lk=1500, heads=1, dim=128),
    Case("split-2", lq=70, lk=300, splits=2),
    Case("split-clusters", clusters(4, 6), lq=70, lk=300, splits=3, row_scale=True, dtype=F16),
    Case("split-runs", loose_runs(ordered=True), lk=300, splits=4, segments=((1, 30),)),
    Case("split-uncovered", loose_runs(), lk=300, splits=3),
    Case("split-mask", masked((64, 64)), lk=290, splits=3),
    Case("split-more-than-stages", blocks(64, 64), lk=130, splits=32, dim=96),
    Case("split-256", lq=66, lk=130, splits=2, dim=256, heads=1),
    Case("split-kv-len", kv_len=(20, 100), batch=2, splits=3, heads=1),
    Case("split-huge-scores", blocks(64, 64), lk=300, splits=3, magnitude=300.0),
]

ALL = SHAPES + PLANS + OPTIONS + SPLITS
