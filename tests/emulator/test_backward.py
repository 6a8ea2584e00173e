"""Gradients of attention by the portable kernels (csrc/kernels/attention/backward*.h), emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ALL, BF16, F16, Case, Problem, blocks, build, clusters, loose_runs, masked
from emulator_backward import Gradients, backward
from gradients import KERNEL_DIM, Solution, check_gradients, solve

from emulator import EAGER_SKEW, LAZY_FORWARD, LAZY_REVERSE, RANDOMS, EmulatorError, Policy

CASES = [case for case in ALL if case.dim <= KERNEL_DIM]


def run(p: Problem, s: Solution, policy: Policy = LAZY_FORWARD, **changes: object) -> Gradients:
    tensors = {"dout": s.dout, "dlse": s.dlse, "out": s.out, "lse": s.lse, "q": p.q, "k": p.k, "v": p.v}
    return backward(**{**tensors, "plan": p.plan, "policy": policy, **p.options, **changes})


def solved(case: Case, *, with_dlse: bool = True) -> tuple[Problem, Solution]:
    problem = build(case)
    return problem, solve(problem, with_dlse=with_dlse)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_case_under_four_policies(number: int) -> None:
    problem, solution = solved(CASES[number], with_dlse=number % 2 == 0)
    first: dict[str, torch.Tensor] | None = None
    for policy in (LAZY_FORWARD, LAZY_REVERSE, EAGER_SKEW, RANDOMS[number % 3]):
        got = run(problem, solution, policy).named()
        try:
            check_gradients(problem, solution, got)
            first = first or got
            assert all(torch.equal(got[n], first[n]) for n in got), "bits differ from the first policy's"
        except AssertionError as error:
            raise AssertionError(f"{CASES[number].name}, policy {policy}: {error}") from None


@pytest.mark.parametrize("policy", [LAZY_REVERSE, RANDOMS[0]], ids=str)
def test_more_tiles_than_threads_look_at_once(policy: Policy) -> None:
    problem, solution = solved(Case("many-tiles", blocks(1, 20, p=0.6), lq=531, lk=40, heads=1))
    assert len(problem.plan.tiles) > 512
    check_gradients(problem, solution, run(problem, solution, policy).named())


@pytest.mark.parametrize("case", [
    Case("gqa-orders", clusters(4, 5), heads=4, kv_heads=2, lk=200, kv_len=(150,)),
    Case("gqa-orders-128", loose_runs(ordered=True), heads=2, kv_heads=1, dim=104, batch=2, dtype=F16),
    Case("gqa-one-order", clusters(4, 5, heads=False), heads=4, kv_heads=2, row_scale=True),
    Case("segment-sums", masked((64, 64)), batch=3, kv_heads=1, segments=((1, 70), (3, 5)), row_scale=True),
    Case("segment-ordered", loose_runs(ordered=True), batch=2, segments=((1, 66),), kv_len=(40, 0)),
    Case("tiles-of-few-rows", blocks(5, 64), lq=133, lk=200, heads=1),
], ids=lambda c: c.name)  # fmt: skip
def test_sums_over_heads_and_batch(case: Case) -> None:
    problem, solution = solved(case)
    for policy in (LAZY_FORWARD, RANDOMS[1]):
        check_gradients(problem, solution, run(problem, solution, policy).named())


def test_nan_in_dout_stays_with_its_row_and_the_blocks_it_reads() -> None:
    problem, solution = solved(Case("nan-dout", blocks(64, 64), lq=200, lk=320, heads=1), with_dlse=False)
    clean = run(problem, solution)
    reads = problem.mask[0, 0]
    row = int(((reads.sum(-1) > 0) & ~reads.all(-1)).nonzero()[0])
    solution.dout[0, row] = torch.nan
    got = run(problem, solution)
    assert got.dq[0, row].isnan().all()
    others = torch.arange(problem.case.lq) != row
    assert torch.equal(got.dq[0, others], clean.dq[0, others])
    for name in ("dk", "dv"):
        now, before = (getattr(g, name)[0, :, 0] for g in (got, clean))
        assert now[reads[row]].isnan().all()
        assert torch.equal(now[~reads[row]], before[~reads[row]])


@pytest.mark.parametrize("seed", range(8))
def test_damaged_plans_stay_inside_the_tensors(seed: int) -> None:
    """Wrong numbers may come out, but every access is inside: the buffers end at unmapped pages."""
    g = torch.Generator().manual_seed(seed)
    make = [blocks(40, 33), clusters(4, 6), masked((32, 48)), loose_runs(ordered=True)][seed % 4]
    case = Case(f"damaged-{seed}", make, batch=2, lq=70, lk=90, kv_len=(60, 90), segments=((1, 9),) * (seed % 2))
    problem, solution = solved(replace(case, kv_heads=1 + seed // 4))
    wild = torch.tensor([-(2**31), -70000, -5, -1, 0, 3, 69, 70, 89, 90, 1000, 2**30, 2**31 - 1], dtype=torch.int32)

    def damage(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or t.numel() == 0:
            return t
        at = torch.rand(t.shape, generator=g) < 0.3
        return torch.where(at, wild[torch.randint(0, len(wild), t.shape, generator=g)], t).contiguous()

    p = problem.plan
    names = ("tiles", "run_ptr", "runs", "mask_bits", "q_order", "kv_order")
    problem.plan = replace(p, **{name: damage(getattr(p, name)) for name in names})
    run(problem, solution, RANDOMS[seed % 3])


@pytest.mark.parametrize(("batch", "lq", "lk"), [(0, 5, 5), (1, 0, 5), (2, 5, 0)])
def test_empty_tensors(batch: int, lq: int, lk: int) -> None:
    q, k = torch.randn(batch, lq, 2, 64).to(F16), torch.randn(batch, lk, 2, 64).to(F16)
    segment = torch.randn(1, 3, 2, 64).to(F16)
    lse = torch.full((batch, 2, lq), -torch.inf)
    for segments in ([], [(segment, segment)]) if lq == 0 or batch == 0 else ([],):
        got = backward(q, None, q, lse, q, k, k, segments=segments).named()
        assert all(not t.any() for t in got.values())


def test_head_dims_without_a_kernel_are_refused() -> None:
    problem, solution = solved(Case("wide", lq=5, lk=5, heads=1, dim=136))
    with pytest.raises(EmulatorError, match="error code 1"):
        run(problem, solution)


def test_any_strides_of_dout() -> None:
    problem, solution = solved(Case("dout-strides", blocks(64, 64), batch=2, dtype=BF16))
    want = run(problem, solution).named()
    for kind in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: torch.cat([t, t], 3)[..., :64]):
        got = run(problem, solution, dout=kind(solution.dout)).named()
        assert all(torch.equal(got[n], want[n]) for n in got)
