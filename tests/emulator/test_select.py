"""The selection kernels (csrc/kernels/select), emulated: equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from emulator_select import select
from select_rows import KINDS, draw

from emulator import LAZY_FORWARD, RANDOMS, EmulatorError, Policy, stats
from vdit_fast.reference import select as reference

SMALL = (1, 2, 31, 32, 33, 97, 128, 129, 1021)
LARGE = (4097, 8209)  # read again by every pass, 1024 threads


def counts(n: int) -> list[int]:
    return sorted({-3, 0, 1, n // 3, n - 1, n, n + 7})


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_of_short_rows(policy: Policy, kind: str) -> None:
    for n in SMALL:
        scores = draw(kind, 3, n, seed=n)
        for k in counts(n):
            want = reference.select_top_k(scores, k)
            assert torch.equal(select(scores, k, policy=policy), want), (n, k)


@pytest.mark.parametrize("kind", KINDS)
def test_top_p_of_short_rows(policy: Policy, kind: str) -> None:
    for n in SMALL:
        mass = draw(kind, 2, n, seed=n)
        for p, least in ((0.0, 1), (0.5, n // 2), (0.9, 0), (1.0, 3)):
            want = reference.select_top_p(mass, p, least)
            assert torch.equal(select(mass, least, p, policy), want), (n, p, least)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LARGE)
def test_long_rows(policy: Policy, kind: str, n: int) -> None:
    entries = draw(kind, 2, n, seed=n)
    for k in (1, n // 3, n - 1):
        assert torch.equal(select(entries, k, policy=policy), reference.select_top_k(entries, k)), k
    for p, least in ((0.3, n // 2), (0.9, 1)):
        assert torch.equal(select(entries, least, p, policy), reference.select_top_p(entries, p, least)), p


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_count_per_row(policy: Policy, dtype: torch.dtype) -> None:
    scores = draw("ties", 12, 67).view(3, 4, 67)
    k = torch.randint(-2, 70, (3, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(select(scores, k, policy=policy), reference.select_top_k(scores, k))
    assert torch.equal(select(scores, k[:, :1], policy=policy), reference.select_top_k(scores, k[:, :1]))


def test_sums_that_need_more_than_32_bits(policy: Policy) -> None:
    """Low words that overflow and carry, and high words."""
    g = torch.Generator().manual_seed(3)
    mass = torch.rand(2, 700, generator=g) * torch.tensor([[1.0], [300.0]])
    mass[:, ::3] = 0.625 + torch.arange(234) * 2.0**-24  # many in one bin of every pass but the last
    for p in (0.05, 0.35, 0.62, 0.97):
        assert torch.equal(select(mass, 1, p, policy), reference.select_top_p(mass, p)), p


def test_share_at_the_border_of_an_entry() -> None:
    mass = torch.tensor([[0.25, 0.125, 0.25, 0.125, 0.25]])
    for p in (0.0, 0.25, 0.2499999, 0.5, 0.75, 0.875, 0.8749999, 1.0):
        assert torch.equal(select(mass, 1, p), reference.select_top_p(mass, p)), p


@pytest.mark.parametrize("seed", range(6))
def test_random_rows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 3000, (), generator=g))
    entries = draw(KINDS[seed % len(KINDS)], 4, n, seed)
    k = torch.randint(0, n + 2, (4,), generator=g)
    p = float(torch.rand((), generator=g))
    policy = RANDOMS[seed % 3]
    assert torch.equal(select(entries, k, policy=policy), reference.select_top_k(entries, k))
    assert torch.equal(select(entries, n // 9, p, policy), reference.select_top_p(entries, p, n // 9))


def test_one_block_per_row_and_bad_sizes() -> None:
    stats("select")
    select(torch.randn(5, 40), 3)
    assert stats("select").blocks == 5
    assert select(torch.randn(0, 40), 3).shape == (0, 40)
    with pytest.raises(EmulatorError, match="error code 1"):
        select(torch.randn(3, 0), 3, policy=LAZY_FORWARD)
