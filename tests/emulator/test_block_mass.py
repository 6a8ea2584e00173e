"""The search kernels over scores (csrc/kernels/select/block_mass.cu), emulated."""

from __future__ import annotations

import pytest
import torch
from emulator_block_mass import block_mass, score_lse, softmax_mass
from mass_cases import ALL, BF16, MassCase, build, check_lse, check_mass, check_softmax

from emulator import POLICIES, RANDOMS, EmulatorError
from vdit_fast import reference


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_case_under_every_policy(case: MassCase) -> None:
    problem = build(case)
    first = None
    for policy in POLICIES:
        lse = score_lse(problem.q, problem.k, **problem.options, policy=policy)
        mass = block_mass(*problem.mass_args, **problem.options, policy=policy)
        softmax = softmax_mass(*problem.softmax_args, **problem.softmax_options, policy=policy)
        try:
            check_lse(problem, lse)
            check_mass(problem, mass)
            check_softmax(problem, softmax)
            found = (lse, mass, softmax)
            first = first or found
            assert all(map(torch.equal, found, first)), "bits differ from the first policy's"
        except AssertionError as error:
            raise AssertionError(f"{case.name}, policy {policy}: {error}") from None


@pytest.mark.parametrize("fold", [1, 3])
def test_rows_sum_to_their_queries(fold: int) -> None:
    problem = build(MassCase("sums", lq=210, lk=333, fold=fold, heads=1, kv_heads=1))
    lse = score_lse(problem.q, problem.k, fold=fold)
    mass = block_mass(problem.q, problem.k, lse, 32, 20, fold=fold, policy=RANDOMS[0])
    rows = torch.full((mass.shape[2],), 32.0)
    rows[-1] = lse.shape[2] - 32 * (len(rows) - 1)
    torch.testing.assert_close(mass.sum(-1)[0, 0], rows, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("q_block", "fold"), [(3, 1), (16, 1), (8, 6), (200, 1)])
def test_dead_rows_hide_nan(q_block: int, fold: int) -> None:
    """A row of log-sum-exp -inf counts nothing, whatever its query and the keys hold."""
    problem = build(MassCase("nan", lq=230, fold=fold, dead=0.5, q_block=q_block, heads=1, kv_heads=1))
    clean = block_mass(*problem.mass_args, fold=fold)
    dead = (problem.lse[0, 0] == -torch.inf).nonzero()[:, 0].tolist()
    for i in dead:
        problem.q[:, i * fold : (i + 1) * fold] = torch.nan
    assert torch.equal(block_mass(*problem.mass_args, fold=fold), clean)
    problem.lse[:] = -torch.inf
    problem.k[:] = torch.nan
    assert not block_mass(*problem.mass_args, fold=fold).any()


def test_nan_stays_in_its_block() -> None:
    problem = build(MassCase("nan-key", lq=70, lk=150, q_block=16, kv_block=16, heads=1, kv_heads=1))
    clean = block_mass(*problem.mass_args)
    problem.k[0, 70] = torch.nan
    mass = block_mass(*problem.mass_args)
    assert mass[..., 4].isnan().all()
    mass[..., 4] = clean[..., 4]
    assert torch.equal(mass, clean)
    assert score_lse(problem.q, problem.k).isnan().all()
    problem = build(MassCase("nan-query", lq=70, lk=150, heads=1, kv_heads=1))
    clean = score_lse(problem.q, problem.k)
    problem.q[0, 0] = torch.nan
    lse = score_lse(problem.q, problem.k)
    assert lse[0, 0, 0].isnan() and torch.equal(lse[..., 1:], clean[..., 1:])


def test_weights_beyond_fp32_are_infinite() -> None:
    problem = build(MassCase("absurd", heads=1, kv_heads=1))
    problem.lse -= 200
    assert (block_mass(*problem.mass_args) == torch.inf).all()
    problem.lse += 400
    assert not block_mass(*problem.mass_args).any()


@pytest.mark.parametrize("key", [0, 40, 70, 149])
def test_infinite_scores(key: int) -> None:
    """A score of +inf makes its row's LSE +inf, in stages before, at and behind others; NaN wins."""
    problem = build(MassCase("inf", lk=150, batch=2, heads=1, kv_heads=1))
    q, k = problem.q, problem.k
    k[0, key, 0, 3] = k[1, 100, 0, 3] = k[1, key, 0, 3] = torch.inf  # scores of both signs
    q[1, 5, 0, 4], q[0, 7, 0, 3] = torch.nan, 0.0
    lse, want = score_lse(q, k, policy=RANDOMS[0]), reference.score_lse(q, k)
    assert lse[0, 0].isposinf().sum() > 20 and lse[0, 0].isfinite().sum() > 20 and lse[0, 0, 7].isnan()
    torch.testing.assert_close(lse, want, rtol=2e-5, atol=2e-5, equal_nan=True)
    for given in (want, torch.zeros_like(want)):
        mass, want_mass = block_mass(q, k, given, 5, 32), reference.block_mass(q, k, given, 5, 32)
        torch.testing.assert_close(mass, want_mass, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_wild_lengths_stay_inside_the_tensors() -> None:
    problem = build(MassCase("wild", batch=2, fold=3))
    for kv_len in (torch.tensor([-3, 2**31 - 1], dtype=torch.int32), torch.tensor([-(2**62), 2**62])):
        lse = score_lse(problem.q, problem.k, fold=3, kv_len=kv_len, policy=RANDOMS[1])
        assert (lse[0] == -torch.inf).all()
        torch.testing.assert_close(lse[1].double(), problem.want_lse[1], rtol=1e-5, atol=1e-5)


def test_queries_beyond_their_length_may_hold_anything() -> None:
    problem = build(MassCase("beyond", fold=3, q_len=(70,), q_block=8, kv_block=8))
    clean = softmax_mass(*problem.softmax_args, **problem.softmax_options)
    problem.q[:, 70:] = torch.nan
    assert torch.equal(softmax_mass(*problem.softmax_args, **problem.softmax_options), clean) and clean.any()
    check_softmax(problem, clean)


def test_calls_the_kernel_cannot_serve_are_refused() -> None:
    def tensors(dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(1, 5, 1, dim).to(dtype) for _ in range(2)]

    wide = torch.randn(1, 5, 1, 68).to(BF16)
    for q, k in (tensors(20, BF16), tensors(264, BF16), tensors(64, torch.float32), (wide[..., :64], wide[..., :64])):
        with pytest.raises(EmulatorError, match="error code 1"):
            score_lse(q, k)
    q, k = tensors(64, BF16)
    for blocks, fold in (((0, 1), 1), ((1, 0), 1), ((1, 1), 0)):
        with pytest.raises(EmulatorError, match="error code 1"):
            block_mass(q, k, torch.zeros(1, 1, 5), *blocks, fold=fold)


def test_blocks_larger_than_everything() -> None:
    problem = build(MassCase("huge", heads=1, kv_heads=1))
    args, most = problem.mass_args[:3], 2**63 - 1
    assert torch.equal(block_mass(*args, most, most), block_mass(*args, 150, 170))


@pytest.mark.parametrize(("batch", "lq", "lk"), [(0, 5, 5), (1, 0, 5), (2, 5, 0)])
def test_empty_tensors(batch: int, lq: int, lk: int) -> None:
    q, k = torch.randn(batch, lq, 2, 64).to(BF16), torch.randn(batch, lk, 2, 64).to(BF16)
    assert (score_lse(q, k) == -torch.inf).all()
    assert block_mass(q, k, torch.zeros(batch, 2, lq), 2, 2).numel() == 0
