"""Every kind of misuse raises the alarm it should, and the same kernel without the misuse raises none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emulator import ANY_ORDER, EAGER_SKEW, LAZY, LAZY_FORWARD, POLICIES, RANDOM, EmulatorError, Policy, run_case

RANDOM_SEEDS = [Policy(f"random-{seed}", RANDOM, ANY_ORDER, seed=seed) for seed in range(1, 9)]


def run(name: str, bug: int, policy: Policy, map_bug: int = 0) -> tuple[Tensor, Tensor]:
    """Run a case of misuse.h; returns its input and output, 1024 finite words each."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(2048, generator=generator).bfloat16().view(torch.int32)
    out = torch.zeros(1024, dtype=torch.int32)
    run_case(name, [data], [out], [bug, map_bug], policy)
    return data, out


# case -> what the alarm says, in every schedule; "output": the result is wrong, in at least one schedule
ALARMS = {
    "copy_not_waited_for": "output",
    "copy_wait_without_barrier": "output",
    "copy_into_live_stage": "output",
    "copy_left_in_flight": "cp.async in flight",
    "shared_out_of_bounds": "st.shared: shared address 0x[0-9a-f]+ . 16 bytes is outside",
    "shared_misaligned": "ld.shared: shared address 0x[0-9a-f]+ is not 16-byte aligned",
    "global_out_of_bounds_read": r"read of 112 bytes past the end of in\[0\] \[block \(0,0,0\) thread 7 ",
    "global_out_of_bounds_write": r"write to 112 bytes past the end of out\[0\].*thread 7 ",
    "global_write_to_input": r"write to byte \d+ of in\[0\], which is read-only",
    "global_misaligned": "ld.global.v4: global address .* is not 16-byte aligned",
    "shuffle_in_divergent_branch": "exited|deadlock.*shfl.bfly of lanes ffffffff",
    "different_collectives": "divergent warp collective",
    "barrier_in_divergent_warp": "bar.sync in a divergent branch",
    "barrier_missing_threads": "deadlock: .32 of threads 0..31: bar.sync barrier 1, 32 of 64 threads arrived",
    "barrier_counts_differ": "earlier arrivals said",
    "barrier_left_half_arrived": "named barrier 1 half arrived",
    "endless_loop": "loops without reaching any synchronisation",
    "endless_trading": "CPU seconds: .*__syncthreads barrier 0",
    "mbar_never_initialised": "no initialised mbarrier",
    "mbar_overwritten": "no initialised mbarrier",
    "mbar_too_many_arrivals": "more arrivals than its count 2",
}
ENDLESS = {"endless_loop", "endless_trading"}  # need a short time limit


def limited(name: str, policy: Policy) -> Policy:
    return replace(policy, cpu_seconds=0.2) if name in ENDLESS else policy


@pytest.mark.parametrize("name", ALARMS)
def test_right_kernels_raise_no_alarm(name: str, policy: Policy) -> None:
    data, out = run(name, 0, limited(name, policy))
    if ALARMS[name] == "output":
        count = 64 if name == "copy_wait_without_barrier" else 32
        wanted = data[: 4 * count].view(count, 4)
        assert torch.equal(out[: 4 * count].view(count, 4), wanted.flip(0) if count == 64 else wanted)


@pytest.mark.parametrize("name", [n for n, alarm in ALARMS.items() if alarm != "output"])
def test_alarms(name: str) -> None:
    for policy in [LAZY_FORWARD] if name in ENDLESS else POLICIES:
        limit = limited(name, policy)
        with pytest.raises(EmulatorError, match=ALARMS[name]) as raised:
            run(name, 1, limit)
        assert str(limit) in str(raised.value)


@pytest.mark.parametrize("name", [n for n, alarm in ALARMS.items() if alarm == "output"])
def test_missing_waits_change_the_result(name: str) -> None:
    right = [run(name, 0, p)[1] for p in POLICIES]
    assert all(torch.equal(r, right[0]) for r in right)
    caught = [p.name for p in POLICIES if not torch.equal(run(name, 1, p)[1], right[0])]
    assert "lazy-forward" in caught, caught


# tma_pipeline: bug number -> what one of the schedules says
PIPELINE = {
    1: "output|deadlock",
    2: "deadlock.*mbarrier wait|output",
    3: "output",
    4: "deadlock.*mbarrier wait .*bytes pending",
    5: "init no fence.mbarrier_init followed",
    6: "not aligned to the 1024-byte pattern|is outside",
    7: "output|more arrivals",
    8: "output|deadlock|more arrivals",
    9: "TMA loads in flight",
    10: "which is in use",
}


def outcome(name: str, bug: int, policy: Policy, wanted: Tensor, map_bug: int = 0) -> str:
    """'' for the right result, 'output' for a wrong one, else the alarm."""
    try:
        return "" if torch.equal(run(name, bug, policy, map_bug)[1], wanted) else "output"
    except EmulatorError as error:
        return str(error)


def matching(outcomes: list[str], pattern: str) -> list[str]:
    return [o for o in outcomes if re.search(pattern, o)]


def unswizzled(data: Tensor) -> Tensor:
    """Shared memory after a load of rows of 128 bytes with the 128-byte swizzle: chunk c of row r lies at c ^ r % 8."""
    rows = data[:1024].view(32, 8, 4)
    r, c = torch.arange(32)[:, None], torch.arange(8)
    return rows[r, c ^ (r % 8)].flatten()


def test_right_pipeline(policy: Policy) -> None:
    data, out = run("tma_pipeline", 0, policy)
    assert torch.equal(out, unswizzled(data))


@pytest.mark.parametrize("bug", PIPELINE)
def test_broken_pipelines(bug: int) -> None:
    wanted = run("tma_pipeline", 0, LAZY_FORWARD)[1]
    outcomes = [outcome("tma_pipeline", bug, p, wanted) for p in [*POLICIES, *RANDOM_SEEDS]]
    assert matching(outcomes, PIPELINE[bug]), outcomes


@pytest.mark.parametrize(
    "bug, alarm",
    [
        (1, r"globalStrides\[1\] is not a multiple of 16"),
        (2, "inner dimension of the box exceeds the swizzle span"),
        (3, r"boxDim\[0\] . elementSize is not a multiple of 16"),
        (4, r"boxDim\[1\] is not 1 to 256"),
        (5, "globalAddress is not 16-byte aligned"),
        (6, "a 2D instruction on a 3D tensor map"),
    ],
)
def test_bad_tensor_maps(bug: int, alarm: str) -> None:
    with pytest.raises(EmulatorError, match=alarm):
        run("tma_pipeline", 0, LAZY_FORWARD, map_bug=bug)


def test_tma_store(policy: Policy) -> None:
    out = run("tma_store", 0, policy)[1].view(32, 32)
    row, column = torch.arange(8)[:, None], torch.arange(32)
    wanted = torch.zeros(32, 32, dtype=torch.int32)
    wanted[:8] = ((column // 4) ^ row) * 4 + column % 4
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    "bug, alarm",
    [(1, "TMA store reads shared .*, which thread .* without its fence"), (2, "TMA stores it did not wait for")],
)
def test_broken_tma_stores(bug: int, alarm: str, policy: Policy) -> None:
    with pytest.raises(EmulatorError, match=alarm):
        run("tma_store", bug, policy)


def test_tma_store_source_overwritten() -> None:
    wanted = run("tma_store", 0, LAZY_FORWARD)[1]
    assert outcome("tma_store", 3, LAZY_FORWARD, wanted) == "output"
    assert outcome("tma_store", 3, EAGER_SKEW, wanted) == ""


# wgmma: bug number -> what every schedule says ("some": at least the lazy ones)
WGMMA = {
    1: ("some", "output"),
    2: ("all", "was written while a wgmma on it was in flight"),
    3: ("all", "wgmma in flight|output"),
    4: ("all", "without a wgmma.fence"),
    5: ("all", "wgmma B reads shared .* without its fence.proxy.async"),
    6: ("some", "A operand in lane 0 changed"),
    7: ("some", "wgmma in flight"),
    8: ("all", "not in the first row"),
    9: ("all", "warps of a warpgroup issue different wgmmas"),
    10: ("some", "output|without its fence"),
    11: ("all", "which cp.async wrote, without fence.proxy.async"),
}


@pytest.mark.parametrize("bug", WGMMA)
def test_broken_wgmma(bug: int) -> None:
    wanted = run("wgmma", 0, LAZY_FORWARD)[1]
    assert wanted.any() and all(torch.equal(run("wgmma", 0, p)[1], wanted) for p in POLICIES)
    how_many, alarm = WGMMA[bug]
    policies = POLICIES if how_many == "all" else [p for p in POLICIES if p.asynchronous == LAZY]
    outcomes = [outcome("wgmma", bug, p, wanted) for p in policies]
    assert len(matching(outcomes, alarm)) == len(policies), outcomes


@pytest.mark.parametrize(
    "bug, alarm",
    [
        (1, "deadlock.*setmaxnreg.inc to 240 registers"),
        (2, "setmaxnreg.dec to 200, but the warp has 168"),
        (3, "deadlock.*setmaxnreg.inc|different numbers of registers"),
    ],
)
def test_register_pool(bug: int, alarm: str, policy: Policy) -> None:
    run("register_trade", 0, policy)
    with pytest.raises(EmulatorError, match=alarm):
        run("register_trade", bug, policy)


@pytest.mark.parametrize("bug, alarm", [(1, "grid 1 x 65536"), (2, "1056 threads"), (3, "233472 bytes of dynamic")])
def test_bad_launches(bug: int, alarm: str) -> None:
    with pytest.raises(EmulatorError, match=alarm):
        run("bad_launch", bug, LAZY_FORWARD)


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(EmulatorError, match="no case nonsense"):
        run_case("nonsense")
