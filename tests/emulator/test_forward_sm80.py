"""The portable forward attention kernel (csrc/kernels/attention/forward_sm80.h) and what surrounds it, emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ALL, BF16, F16, Case, blocks, build, check, clusters, loose_runs, masked

from emulator import LAZY_FORWARD, LAZY_REVERSE, POLICIES, RANDOMS, EmulatorError, Policy, attention
from vdit_fast import AttentionPlan


def run(problem, policy: Policy = LAZY_FORWARD, **changes):
    case = problem.case
    arguments = {"policy": policy, "splits": case.splits, **problem.options, **changes}
    return attention(problem.q, problem.k, problem.v, problem.plan, **arguments)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_case_under_every_policy(case: Case) -> None:
    problem = build(case)
    first = None
    for policy in POLICIES:
        out, lse = run(problem, policy)
        try:
            check(problem, out, lse)
            first = first or (out, lse)
            assert torch.equal(out, first[0]) and torch.equal(lse, first[1]), "bits differ from the first policy's"
        except AssertionError as error:
            raise AssertionError(f"{case.name}, policy {policy}: {error}") from None


@pytest.mark.parametrize("policy", [LAZY_REVERSE, RANDOMS[0]], ids=str)
def test_more_tiles_than_threads_of_the_schedule(policy: Policy) -> None:
    problem = build(Case("many-tiles", blocks(1, 20, p=0.6), lq=531, lk=40, heads=1))
    assert len(problem.plan.tiles) > 512
    check(problem, *run(problem, policy))


@pytest.mark.parametrize("case", [
    Case("nan-read-blocks", blocks(64, 37), lq=200, heads=1),
    Case("nan-read-runs", loose_runs(ordered=True, covered=True), lk=300, heads=2, splits=2),
    Case("nan-read-clusters", clusters(5, 7), dim=256, lq=90, heads=1),
], ids=lambda c: c.name)  # fmt: skip
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_reaches_the_rows_that_read_it_and_no_other(case: Case, where: str) -> None:
    problem = build(case)
    clean, clean_lse = run(problem)
    read = problem.mask.sum(2).flatten(0, 1)  # [heads, keys]
    key = int(((read > 0) & (read < case.lq)).all(0).nonzero()[0])
    getattr(problem, where)[:, key] = torch.nan
    out, lse = run(problem)
    reads = problem.mask[..., key]  # [B, H, Lq]
    rows = out.transpose(1, 2)
    assert rows[reads].isnan().all()
    assert torch.equal(rows[~reads], clean.transpose(1, 2)[~reads])
    if where == "k":
        assert lse[reads].isnan().all()
    assert torch.equal(lse[~reads], clean_lse[~reads])


def test_nan_key_behind_a_cleared_bit_is_harmless() -> None:
    problem = build(Case("nan-bits", masked((64, 64), p=0.5), heads=1))
    clean = run(problem)
    problem.mask[..., 20] = False
    plan = AttentionPlan.from_mask(problem.mask[0], block=(64, 64))
    before = attention(problem.q, problem.k, problem.v, plan)
    problem.k[:, 20] = torch.nan
    after = attention(problem.q, problem.k, problem.v, plan)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(clean[0], before[0])


def test_nan_query_stays_in_its_row() -> None:
    problem = build(Case("nan-query", lq=70, lk=70, heads=1, segments=((1, 5),)))
    clean = run(problem)[0]
    problem.q[0, 0] = torch.nan  # of all rows, the one whose address stands in for slots without a key
    out, lse = run(problem)
    assert out[0, 0].isnan().all() and lse[0, 0, 0].isnan()
    assert torch.equal(out[:, 1:], clean[:, 1:])


def test_infinite_values_arrive() -> None:
    problem = build(Case("infinite", lq=70, lk=70, heads=1))
    problem.v[0, 3, 0, 5] = torch.inf
    out, _ = run(problem)
    assert (out[..., 5] == torch.inf).all()
    assert out[..., :5].isfinite().all() and out[..., 6:].isfinite().all()


def test_rows_whose_scores_are_all_minus_infinity_are_empty() -> None:
    problem = build(Case("minus-infinity", lq=70, lk=70, heads=1))
    problem.q[0, 7] = 0
    problem.q[0, 7, 0, 0] = torch.inf
    problem.k[..., 0] = -1
    out, lse = run(problem)
    assert lse[0, 0, 7] == -torch.inf and not out[0, 7].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("seed", range(12))
def test_damaged_plans_stay_inside_the_tensors(seed: int) -> None:
    """Wrong numbers may come out, but every access is inside: the buffers end at unmapped pages."""
    g = torch.Generator().manual_seed(seed)
    make = [blocks(40, 33), clusters(4, 6), masked((32, 48)), loose_runs(ordered=True)][seed % 4]
    problem = build(
        Case(f"damaged-{seed}", make, batch=2, lq=70, lk=90, kv_len=(60, 90), segments=((1, 9),) * (seed % 2))
    )
    wild = torch.tensor([-(2**31), -70000, -5, -1, 0, 3, 69, 70, 89, 90, 1000, 2**30, 2**31 - 1], dtype=torch.int32)

    def damage(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or t.numel() == 0:
            return t
        at = torch.rand(t.shape, generator=g) < 0.3
        return torch.where(at, wild[torch.randint(0, len(wild), t.shape, generator=g)], t).contiguous()

    p = problem.plan
    fields = ("tiles", "run_ptr", "runs", "q_order", "kv_order")
    problem.plan = replace(p, **{name: damage(getattr(p, name)) for name in fields})
    problem.options["kv_len"] = torch.tensor([-3, 2**31 - 1], dtype=torch.int32)
    run(problem, RANDOMS[seed % 3], splits=seed % 3)


def test_calls_the_kernel_cannot_serve_are_refused() -> None:
    def tensors(dim: int, dtype: torch.dtype):
        return [torch.randn(1, 5, 1, dim).to(dtype) for _ in range(3)]

    wide = torch.randn(1, 5, 1, 68).to(BF16)
    for q, k, v in (
        tensors(20, BF16),
        tensors(264, BF16),
        tensors(64, torch.float32),
        (wide[..., :64], *tensors(64, BF16)[1:]),  # every other row begins at 8 bytes
    ):
        with pytest.raises(EmulatorError, match="error code 1"):
            attention(q, k, v)
    with pytest.raises(EmulatorError, match="error code 1"):
        attention(*tensors(64, BF16), max_shared_bytes=64 * 1024)


@pytest.mark.parametrize(("batch", "lq", "lk"), [(0, 5, 5), (1, 0, 5), (2, 5, 0)])
def test_empty_tensors(batch: int, lq: int, lk: int) -> None:
    q, k = torch.randn(batch, lq, 2, 64).to(F16), torch.randn(batch, lk, 2, 64).to(F16)
    out, lse = attention(q, k, k)
    assert out.shape == (batch, lq, 2, 64) and not out.any()
    assert (lse == -torch.inf).all()


def test_split_results_equal_whole_results() -> None:
    problem = build(Case("split-or-whole", clusters(3, 5), lq=70, lk=300, dim=128))
    whole, lse = run(problem, splits=1)
    for splits in (2, 5, 32):
        part, part_lse = run(problem, splits=splits)
        assert torch.allclose(part.float(), whole.float(), atol=2e-2)
        assert torch.allclose(part_lse, lse, atol=1e-5)
    # Few items and long keys are split by themselves: bits equal those of the number that fits the GPU.
    few = build(Case("split-chosen", lq=3, lk=1100, heads=1))
    assert torch.equal(run(few)[0], run(few, splits=4)[0])
    assert not torch.equal(run(few)[0], run(few, splits=1)[0])
