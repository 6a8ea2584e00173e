"""Problems of score_lse, block_mass and softmax_mass, their fp64 answers and the comparison.

Shared by the emulated kernel (tests/emulator) and the tests on a CUDA device (tests/ops).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cases import strided
from torch import Tensor

from vdit_fast import reference

BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class MassCase:
    """One problem; everything random follows from the name."""

    name: str
    lq: int = 150
    lk: int = 170
    q_block: int = 64
    kv_block: int = 64
    fold: int = 1
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64
    dtype: torch.dtype = BF16
    scale: float | None = None
    kv_len: tuple[int, ...] | None = None
    kv_len_dtype: torch.dtype = torch.int32
    q_len: tuple[int, ...] | None = None  # of softmax_mass
    stride: str = "plain"
    magnitude: float = 1.0
    noise: float = 0.0  # of a stale log-sum-exp
    dead: float = 0.0  # share of rows whose log-sum-exp is -inf
    nan_unread: bool = False  # NaN in keys that do not exist


@dataclass
class MassProblem:
    """Tensors of a case, and its answers in fp64."""

    case: MassCase
    q: Tensor
    k: Tensor
    lse: Tensor  # what block_mass is given
    options: dict[str, Any]
    want_lse: Tensor
    want_mass: Tensor
    base_lse: Tensor  # in fp32 by torch
    base_mass: Tensor
    want_softmax: Tensor
    base_softmax: Tensor

    @property
    def mass_args(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        return self.q, self.k, self.lse, self.case.q_block, self.case.kv_block

    @property
    def softmax_args(self) -> tuple[Tensor, Tensor, int, int]:
        return self.q, self.k, self.case.q_block, self.case.kv_block

    @property
    def softmax_options(self) -> dict[str, Any]:
        q_len = self.case.q_len
        return {**self.options, "q_len": None if q_len is None else torch.tensor(q_len, dtype=self.case.kv_len_dtype)}


def build(c: MassCase) -> MassProblem:
    g = torch.Generator().manual_seed(sum(map(ord, c.name)))
    q = (torch.randn(c.batch, c.lq, c.heads, c.dim, generator=g) * c.magnitude).to(c.dtype)
    k = torch.randn(c.batch, c.lk, c.kv_heads, c.dim, generator=g).to(c.dtype)
    kv_len = None if c.kv_len is None else torch.tensor(c.kv_len, dtype=c.kv_len_dtype)
    options = {"scale": c.scale, "fold": c.fold, "kv_len": kv_len}
    want = reference.score_lse(q.double(), k.double(), **options)
    base = reference.score_lse(q.float(), k.float(), **options)
    lse = want.float() + c.noise * torch.randn(want.shape, generator=g)
    lse[torch.rand(lse.shape, generator=g) < c.dead] = -torch.inf
    blocks = c.q_block, c.kv_block
    want_mass = reference.block_mass(q.double(), k.double(), lse, *blocks, **options)
    base_mass = reference.block_mass(q.float(), k.float(), lse, *blocks, **options)
    q_len = None if c.q_len is None else torch.tensor(c.q_len)
    softmax = [
        reference.softmax_mass(to(q), to(k), *blocks, **options, q_len=q_len) for to in (Tensor.double, Tensor.float)
    ]
    if c.nan_unread and c.kv_len is not None:
        for b, n in enumerate(c.kv_len):
            k[b, n:] = torch.nan
    q, k = strided(q, c.stride), strided(k, c.stride)
    return MassProblem(c, q, k, lse, options, want, want_mass, base, base_mass, *softmax)


def check_lse(p: MassProblem, lse: Tensor) -> None:
    """AssertionError unless -inf is where it must be and errors are at most twice those of torch in fp32."""
    got, want = lse.cpu().double(), p.want_lse
    assert got.shape == want.shape and lse.dtype == torch.float32
    empty = want == -torch.inf
    assert torch.equal(got == -torch.inf, empty)
    if empty.all():
        return
    error, base = ((x - want)[~empty].abs().max().item() for x in (got, p.base_lse.double()))
    limit = 2 * base + 1e-6 * max(1.0, want[~empty].abs().max().item())
    assert error <= limit, f"error of lse {error:.2e}, limit {limit:.2e}"


def check_mass(p: MassProblem, mass: Tensor) -> None:
    """AssertionError unless zeros are exact and errors are at most twice those of torch in fp32."""
    _check_mass(mass, p.want_mass, p.base_mass)


def check_softmax(p: MassProblem, mass: Tensor) -> None:
    """The same for softmax_mass."""
    _check_mass(mass, p.want_softmax, p.base_softmax)


def _check_mass(mass: Tensor, want: Tensor, base_mass: Tensor) -> None:
    got = mass.cpu().double()
    assert got.shape == want.shape and mass.dtype == torch.float32
    assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} sums are not finite"
    assert not got[want == 0].any(), "sums without a key or a row are not 0"
    if want.numel() == 0:
        return
    error, base = ((x - want).abs().max().item() for x in (got, base_mass.double()))
    limit = 2 * base + 2e-6 * want.max().item()
    assert error <= limit, f"error of mass {error:.2e}, limit {limit:.2e}"


_LENGTHS = (1, 7, 63, 64, 65, 127, 128, 129, 191)
SHAPES = [
    MassCase(f"shape-{lq}x{lk}", lq=lq, lk=lk, heads=1, kv_heads=1, dim=(64, 128, 72)[i % 3], dtype=(BF16, F16)[i % 2])
    for i, (lq, lk) in enumerate([(n, 65) for n in _LENGTHS] + [(65, n) for n in _LENGTHS] + [(300, 300)])
]
DIMS = [
    MassCase(f"dim-{dim}-fold-{fold}", dim=dim, fold=fold, heads=1, kv_heads=1, dtype=(BF16, F16)[dim // 8 % 2])
    for dim in (8, 24, 64, 80, 96, 128, 136, 200, 256)
    for fold in (1, 3)
]
BLOCKS = [
    MassCase(f"blocks-{q}x{kv}", q_block=q, kv_block=kv, lq=270, lk=290, heads=1, kv_heads=1, noise=0.5)
    for q, kv in (
        *((64, 64), (128, 128), (64, 128), (128, 64), (16, 16), (8, 24), (1, 1), (3, 5), (48, 100), (100, 48)),
        *((65, 63), (129, 65), (136, 200), (200, 7), (270, 290), (1000, 1000), (256, 2)),
    )
]
FOLDS = [
    MassCase("fold-2", fold=2, q_block=32, kv_block=32),
    MassCase("fold-4-resident", fold=4, q_block=16, kv_block=16, dim=64, lq=333, lk=350),
    MassCase("fold-8", fold=8, q_block=16, kv_block=16, dim=128, lq=601, lk=640, heads=1, kv_heads=1),
    MassCase("fold-16", fold=16, q_block=8, kv_block=8, lq=777, lk=900, heads=1, kv_heads=1, dtype=F16),
    MassCase("fold-beyond-the-end", lq=30, lk=20, fold=37, q_block=1, kv_block=1),
    MassCase("fold-tails", fold=7, lq=148, lk=183, q_block=5, kv_block=5, dim=72),
    MassCase("fold-passes", fold=2, lq=600, lk=150, q_block=260, kv_block=20, heads=1, kv_heads=1),
    MassCase("fold-passes-streamed", fold=5, lq=1500, lk=400, q_block=290, kv_block=64, heads=1, kv_heads=1),
]
OPTIONS = [
    MassCase("kv-len", batch=3, kv_len=(0, 1, 150), nan_unread=True),
    MassCase("kv-len-64", batch=2, kv_len=(64, 129), kv_len_dtype=torch.int64, nan_unread=True, kv_block=10),
    MassCase("kv-len-fold", batch=3, kv_len=(0, 4, 100), fold=3, q_block=8, kv_block=8, nan_unread=True),
    MassCase("kv-len-passes", batch=2, kv_len=(70, 0), q_block=300, lq=400, nan_unread=True),
    MassCase("kv-len-blocks-of-one", batch=1, kv_len=(33,), q_block=1, kv_block=1, nan_unread=True),
    MassCase("q-len", batch=3, q_len=(0, 1, 149), fold=2, q_block=8, kv_block=8),
    MassCase("q-len-64", batch=2, q_len=(64, 150), kv_len=(170, 31), kv_len_dtype=torch.int64, nan_unread=True),
    MassCase("q-len-fold", q_len=(76,), fold=8, lq=320, kv_len=(90,), q_block=4, kv_block=4, dim=128),
    MassCase("dead", dead=0.4, noise=2.0),
    MassCase("dead-all", dead=1.0),
    MassCase("dead-rows-of-one", dead=0.4, q_block=3),
    MassCase("gqa", heads=4, kv_heads=2, batch=2),
    MassCase("gqa-3", heads=3, kv_heads=1, fold=2),
    MassCase("scale", scale=0.3),
    MassCase("scale-negative", scale=-0.2, fold=3),
    MassCase("scale-zero", scale=0.0, kv_len=(100,)),
    MassCase("large-scores", magnitude=30.0),
    MassCase("stale", noise=4.0, dtype=F16),
    MassCase("heads-first", stride="heads_first", batch=2),
    MassCase("sliced", stride="sliced", dim=72),
    MassCase("every-other-row", stride="every_other", batch=2, fold=3),
]
ALL = SHAPES + DIMS + BLOCKS + FOLDS + OPTIONS
