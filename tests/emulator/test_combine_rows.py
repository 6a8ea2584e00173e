"""Rows added up by weight (csrc/kernels/fused/combine_rows.cu), emulated: against the torch twin and fp64."""

from __future__ import annotations

import functools

import pytest
import torch
from combine_cases import BF16, DTYPES, F16, F32, check, draw
from emulator_combine_rows import combine_rows

from emulator import RANDOMS, EmulatorError, Policy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 13, 264, 520])
def test_mixtures(policy: Policy, dim: int, dtype: torch.dtype) -> None:
    run = functools.partial(combine_rows, policy=policy)
    for parts in range(16):
        check(run, draw(dim, dtype, (1, 2, 3, 4, 5, 8)[parts % 6], parts, seed=parts))


@pytest.mark.parametrize("rows", [1, 3, 9, 24])
def test_rows_of_a_block(policy: Policy, rows: int) -> None:
    for k in (1, 2):
        kwargs = draw(40, BF16, k, 7, rows=rows)
        check(functools.partial(combine_rows, policy=policy), kwargs | {"gate": torch.randn(1, 40).to(BF16)})


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("moved", ["rows", "base", "residual", "gate"])
def test_misaligned_rows(moved: str, offset: int) -> None:
    # Each tensor by itself begins beside 16 bytes, or steps beside them.
    kwargs = draw(64, F16, 2, 15)
    x = kwargs[moved]
    wide = x.new_zeros(x.shape[0], x.shape[1] + offset)
    wide[:, offset:] = x
    check(functools.partial(combine_rows, policy=RANDOMS[0]), kwargs | {moved: wide[:, offset:]})
    begins = torch.zeros(x.numel() + offset, dtype=F16)[offset:].view(x.shape).copy_(x)
    check(functools.partial(combine_rows, policy=RANDOMS[1]), kwargs | {moved: begins})


def test_a_single_row_that_ends_inside_a_piece() -> None:
    # No stride tells that it is not made of whole pieces.
    kwargs = draw(13, F32, 1, 0, rows=1)
    check(combine_rows, kwargs | {"slots": torch.zeros(1, 1, dtype=torch.int32), "rows": kwargs["rows"][:1]})


@pytest.mark.parametrize("slot", [-1, -(2**31), 15, 2**31 - 1])
@pytest.mark.parametrize("dim", [16, 13])
def test_slots_outside_count_for_nothing(slot: int, dim: int) -> None:
    kwargs = draw(dim, F32, 2, 1)
    kwargs["slots"][::2, 1] = slot
    want = kwargs["slots"].clone()
    want[::2, 1] = -1
    assert torch.equal(combine_rows(**kwargs), combine_rows(**kwargs | {"slots": want}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [48, 13])
def test_a_row_without_anything_is_its_residual(dtype: torch.dtype, dim: int) -> None:
    bits = torch.int32 if dtype == F32 else torch.int16
    residual = torch.randn(9, dim).to(dtype)
    residual[1, 3], residual[1, 4] = torch.nan, -0.0
    rows, slots = torch.full((3, dim), torch.nan, dtype=dtype), torch.full((9, 2), -1, dtype=torch.int32)
    gate = torch.full((1, dim), torch.inf, dtype=dtype)
    got = combine_rows(rows, slots, residual=residual, gate=gate)
    assert torch.equal(got.view(bits), residual.view(bits))
    assert not combine_rows(rows, slots, torch.ones(9, 2), gate=gate).any()
    assert torch.equal(combine_rows(rows[:0], slots, residual=residual).view(bits), residual.view(bits))


def test_nothing_to_do_and_too_much() -> None:
    slots = torch.zeros(4, 9, dtype=torch.int32)
    assert combine_rows(torch.randn(3, 8), slots[:0, :2]).shape == (0, 8)
    assert combine_rows(torch.randn(3, 0), slots[:, :1].contiguous()).shape == (4, 0)
    with pytest.raises(EmulatorError, match="error code 1"):
        combine_rows(torch.randn(3, 8), slots)
