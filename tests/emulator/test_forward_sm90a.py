"""The Hopper forward kernel in the emulator: the common problems with both producers, under every policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import cases
import pytest
import torch
from cases import BF16, F16, Case, Problem
from torch import Tensor

from emulator import EAGER_SKEW, LAZY_FORWARD, POLICIES, EmulatorError, Policy, attention, stats
from vdit_fast import AttentionPlan

torch.set_num_threads(1)

# The common problems have up to three stages of 128 keys; the rings of two stages have to turn several times.
LONG = [
    Case("long-dense", lk=1100, heads=1, dim=128),
    Case("long-dense-64", lq=150, lk=900, heads=1, dtype=F16),
    Case("long-short-item", lq=50, lk=1000, heads=1, dim=128),  # both warpgroups on the same rows
    Case("long-short-item-64", cases.blocks(64, 100), lq=64, lk=900),
    Case("long-runs", cases.loose_runs(longest=333, most=6, none=0.0), lk=1000, heads=1, dim=96),
    Case("long-clusters", cases.clusters(3, 9), lq=200, lk=800, heads=1, kv_len=(700,)),
    Case("long-mask", cases.masked((130, 256), p=0.6), lk=800, heads=1),
    Case(
        "long-band", cases.masked((200, 400), p=0.0, band=20), lq=200, lk=400, heads=1
    ),  # late rows start with nothing
    Case("long-segments", cases.loose_runs(longest=150), lk=600, heads=1, segments=((1, 200), (1, 130)), dim=128),
    Case("long-splits", lk=1500, heads=1, splits=3),
    Case("long-nan-runs", cases.loose_runs(longest=333, most=6), lk=1000, heads=1, nan_unread=True),
]
CASES = [case for case in cases.ALL + LONG if case.dim <= 128]
NAMES = {case.name: case for case in CASES}


@cache
def problem(name: str) -> Problem:
    return cases.build(NAMES[name])


def by_gather(p: Problem) -> AttentionPlan:
    """The same plan with an order that changes nothing: keys in any order are always gathered."""
    plan = p.plan or AttentionPlan.dense(p.case.lq, p.case.lk)
    return replace(plan, kv_order=torch.arange(p.case.lk, dtype=torch.int32)[None, None].contiguous())


def takes_boxes(plan: AttentionPlan | None) -> bool:
    """The launch chooses the TMA producer for such a plan."""
    return plan is None or (plan.kv_order is None and plan.mask_bits is None)


def with_boxes(case: Case) -> bool:
    return takes_boxes(case.plan(case, torch.Generator().manual_seed(0)) if case.plan else None)


def solve(p: Problem, plan: AttentionPlan | None, policy: Policy) -> tuple[Tensor, Tensor]:
    return attention(p.q, p.k, p.v, plan, policy=policy, variant="sm90a", splits=p.case.splits, **p.options)


@cache
def first_result(name: str, gather: bool) -> tuple[Tensor, Tensor]:
    p = problem(name)
    return solve(p, by_gather(p) if gather else p.plan, LAZY_FORWARD)


def check_bits(name: str, gather: bool, out: Tensor, lse: Tensor) -> None:
    out0, lse0 = first_result(name, gather)
    assert torch.equal(out, out0) and torch.equal(lse, lse0), "another schedule gave other bits"


@pytest.mark.parametrize("name", NAMES)
def test_answer(name: str, policy: Policy) -> None:
    p = problem(name)
    out, lse = solve(p, p.plan, policy)
    cases.check(p, out, lse)
    check_bits(name, False, out, lse)


@pytest.mark.parametrize(
    "name", [c.name for c in cases.PLANS + cases.OPTIONS + LONG if c.name in NAMES and with_boxes(c)]
)
@pytest.mark.parametrize("schedule", [LAZY_FORWARD, EAGER_SKEW, POLICIES[-1]], ids=lambda s: s.name)
def test_answer_by_gather(name: str, schedule: Policy) -> None:
    """The problems that the other test gives to TMA."""
    p = problem(name)
    out, lse = solve(p, by_gather(p), schedule)
    cases.check(p, out, lse)
    check_bits(name, True, out, lse)


@pytest.mark.parametrize("name", [case.name for case in cases.PLANS + LONG if case.name in NAMES])
def test_agrees_with_the_portable_kernel(name: str) -> None:
    p = problem(name)
    out, lse = first_result(name, False)
    other, other_lse = attention(p.q, p.k, p.v, p.plan, variant="sm80", splits=p.case.splits, **p.options)
    ulp = 2.0**-8 if p.case.dtype == BF16 else 2.0**-11
    assert float((out.double() - other.double()).norm()) <= ulp * float(p.out.norm())
    torch.testing.assert_close(lse, other_lse, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("name", ["blocks-64", "blocks-ragged", "clusters", "mask", "segments-dense", "split-2"])
def test_producer(name: str) -> None:
    """Boxes where they are possible, and no mma.sync anywhere."""
    p = problem(name)
    stats("attention")
    solve(p, p.plan, LAZY_FORWARD)
    counts = stats("attention")
    assert counts.wgmma > 0 and counts.mma == 0
    assert (counts.tma > 0) == takes_boxes(p.plan)
    solve(p, by_gather(p), LAZY_FORWARD)
    assert stats("attention").tma == 0


def test_whole_boxes_need_no_copies() -> None:
    """Keys of a dense call come by TMA alone; only Q is copied row by row."""
    p = cases.build(Case("boxes", lq=128, lk=300, heads=1, dim=128))
    stats("attention")
    solve(p, p.plan, LAZY_FORWARD)
    assert stats("attention").cp_async == 128 * 16


def test_larger_head_dims_go_to_the_portable_kernel() -> None:
    p = cases.build(Case("large", lq=20, lk=30, dim=136, heads=1))
    stats("attention")
    out, lse = attention(p.q, p.k, p.v, None, variant="automatic")
    cases.check(p, out, lse)
    assert stats("attention").wgmma == 0
    with pytest.raises(EmulatorError, match="error code"):
        attention(p.q, p.k, p.v, None, variant="sm90a")


def test_unaligned_strides_are_gathered() -> None:
    """A head that is broadcast has stride 0, which TMA does not take."""
    p = cases.build(Case("broadcast", lq=40, lk=200, heads=2, kv_heads=1))
    want = solve(p, None, LAZY_FORWARD)
    k, v = (t.expand(-1, -1, 2, -1) for t in (p.k, p.v))
    stats("attention")
    out, lse = attention(p.q, k, v, None, variant="sm90a")
    assert stats("attention").tma == 0
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0])
def test_rows_without_a_finite_score_are_empty(scale: float) -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 1, 64, generator=g).to(BF16) for n in (130, 200, 200))
    k = k.abs() * (-1 if scale > 0 else 1)
    q[:, 100] = torch.inf
    v[:, 7, :, 3] = torch.inf
    out, lse = attention(q, k, v, None, variant="sm90a", scale=scale)
    if scale == 0:  # 0 * inf
        assert lse[0, 0, 100].isnan() and out[0, 100].isnan().all()
    else:
        assert lse[0, 0, 100] == -torch.inf and not out[0, 100].any()
    assert lse[0, 0, :100].isfinite().all()
    assert (out[0, :100, 0, 3] == torch.inf).all() and out[0, :100, 0, 4:].isfinite().all()


@pytest.mark.parametrize("bits", [False, True], ids=["tma", "gather"])
@pytest.mark.parametrize("seed", range(12))
def test_damaged_plans_stay_inside_the_tensors(seed: int, bits: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    wild = torch.tensor([-(2**31), -7, -1, 0, 1, 63, 128, 199, 200, 10**6, 2**31 - 1])

    def damage(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        values = wild[torch.randint(len(wild), t.shape, generator=g)].int()
        return torch.where(torch.rand(t.shape, generator=g) < 0.25, values, t)

    if bits:
        plan = AttentionPlan.from_mask(torch.rand(150, 200, generator=g) < 0.5, block=(64, 64))
    else:
        plan = AttentionPlan.from_block_mask(torch.rand(3, 8, generator=g) < 0.5, 64, 27, lq=150, lk=200)
    orders = seed % 2 == 0
    plan = replace(
        plan,
        tiles=damage(plan.tiles),
        run_ptr=damage(plan.run_ptr),
        runs=damage(plan.runs),
        mask_bits=damage(plan.mask_bits),
        q_order=damage(torch.randperm(150, generator=g).int())[None, None].contiguous() if orders else None,
        kv_order=damage(torch.randperm(200, generator=g).int())[None, None].contiguous() if orders and bits else None,
    )
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).to(BF16) for n in (150, 200, 200))
    attention(q, k, v, plan, variant="sm90a", policy=POLICIES[seed % len(POLICIES)])
