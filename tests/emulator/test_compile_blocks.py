"""Compilation of block maps (csrc/kernels/plan), emulated: the same lists as the reference, capacity included."""

from __future__ import annotations

import pytest
import torch
from block_maps import Map, draw
from emulator_select import compile_blocks

from emulator import RANDOMS, Policy
from vdit_fast.plan.runs import compile_blocks_reference


def check(m: Map, policy: Policy) -> None:
    want = compile_blocks_reference(m.keep, m.q_len, m.kv_len, lq=m.lq, q_tile=m.q_tile, trim=False)
    got = compile_blocks(m.keep, m.q_len, m.kv_len, m.lq, m.q_tile, policy)
    for name, a, b in zip(("tiles", "run_ptr", "runs"), got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("q_tile", [None, 1, 16])
@pytest.mark.parametrize("nk", [1, 31, 32, 33, 64, 97])
def test_sizes(policy: Policy, nk: int, q_tile: int | None) -> None:
    check(draw(2, 11, nk, q_tile=q_tile, seed=nk), policy)


@pytest.mark.parametrize("shared", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("q_tile", [None, 16])
def test_lengths_of_their_own(policy: Policy, shared: tuple[bool, bool], q_tile: int | None) -> None:
    check(draw(5, 13, 37, shared=shared, q_tile=q_tile, seed=1), policy)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.95, 1.0])
@pytest.mark.parametrize("empty", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("q_tile", [None, 7])
def test_densities(policy: Policy, density: float, empty: float, q_tile: int | None) -> None:
    check(draw(3, 6, 70, density=density, empty=empty, q_tile=q_tile, seed=2), policy)


@pytest.mark.parametrize("policy", RANDOMS[:2], ids=str)
@pytest.mark.parametrize("q_tile", [None, 1])
def test_more_blocks_and_tiles_than_threads(policy: Policy, q_tile: int | None) -> None:
    check(draw(2, 600, 5, q_tile=q_tile, shared=(False, False), seed=3), policy)


def test_all_keys_in_the_last_chunk(policy: Policy) -> None:
    m = draw(1, 4, 100, density=0.8, empty=0.0)
    m.kv_len[:, :70] = 0
    check(m, policy)


def test_a_run_across_chunks_of_empty_blocks(policy: Policy) -> None:
    m = draw(1, 3, 100, density=1.0, empty=0.0)
    m.kv_len[:, 20:90] = 0
    m.keep[:, :, 20:90] = False  # means nothing
    m.keep[:, 1, 95:] = False
    check(m, policy)


def test_negative_lengths_count_as_none(policy: Policy) -> None:
    m = draw(3, 9, 40, shared=(False, False), q_tile=16)
    q_len, kv_len = (torch.where(t == 0, -3, t) for t in (m.q_len, m.kv_len))
    for q_tile in (None, 16):
        want = compile_blocks(m.keep, m.q_len, m.kv_len, m.lq, q_tile, policy)
        got = compile_blocks(m.keep, q_len, kv_len, m.lq, q_tile, policy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), q_tile


def test_tiles_larger_than_everything() -> None:
    m = draw(3, 9, 40)
    want = compile_blocks_reference(m.keep, m.q_len, m.kv_len, lq=m.lq, trim=True)
    tiles, run_ptr, runs = compile_blocks(m.keep, m.q_len, m.kv_len, m.lq, 2**63 - 1)
    used = len(want[0])
    assert torch.equal(tiles[:used], want[0]) and not tiles[used:, 2].any()
    assert torch.equal(run_ptr[: used + 1], want[1]) and torch.equal(runs[: len(want[2])], want[2])


@pytest.mark.parametrize("q_tile", [None, 16])
def test_no_query_blocks(q_tile: int | None) -> None:
    keep, lengths = torch.ones(2, 0, 5, dtype=torch.bool), torch.zeros(1, 0, dtype=torch.int64)
    tiles, run_ptr, runs = compile_blocks(keep, lengths, torch.full((1, 5), 3), 100, q_tile)
    assert tiles.shape == (0, 3) and run_ptr.tolist() == [0] and runs.shape == (0, 3)
