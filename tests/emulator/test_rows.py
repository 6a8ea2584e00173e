"""Rows taken out and put back by the CUDA kernels of csrc/kernels/rows, emulated."""

from __future__ import annotations

import pytest
import torch
from emulator_rows import gather_rows, scatter_rows
from torch import Tensor

from emulator import EAGER_SKEW, LAZY_FORWARD, LAZY_REVERSE, RANDOMS, EmulatorError
from vdit_fast import reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FOUR = (LAZY_FORWARD, LAZY_REVERSE, EAGER_SKEW, RANDOMS[0])
WILD = torch.tensor([-(2**31), -1, 2**31 - 1, 10**6], dtype=torch.int32)


def draw_rows(batch: int, tokens: int, slots: int) -> Tensor:
    return torch.rand(batch, tokens).argsort(-1)[:, :slots].to(torch.int32)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-100, 100, shape).to(dtype) if not dtype.is_floating_point else torch.randn(shape).to(dtype)


def strided(shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> Tensor:
    b, n, c = shape
    if kind == "odd rows":  # the first is aligned to 16 bytes, others are not
        return values((b, n, c + 3), dtype)[..., :c]
    if kind == "odd start":
        return values((b, n, c + 8), dtype)[..., 1 : 1 + c]
    if kind == "batch last":
        return values((n, b, c), dtype).transpose(0, 1)
    return values(shape, dtype)


MOVES = [
    ((2, 150, 64), 70, BF16, "contiguous"),
    ((1, 300, 8), 200, F32, "odd rows"),
    ((2, 20, 2600), 9, F32, "contiguous"),  # a CTA takes three such rows
    ((1, 40, 7), 33, F16, "contiguous"),
    ((3, 65, 6), 65, F16, "batch last"),
    ((2, 33, 24), 12, F16, "odd start"),
    ((2, 41, 13), 20, torch.uint8, "contiguous"),
    ((1, 1, 1), 1, torch.int16, "contiguous"),
]


@pytest.mark.parametrize(("shape", "slots", "dtype", "kind"), MOVES, ids=str)
def test_rows_move(shape: tuple[int, int, int], slots: int, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(slots)
    b, n, _ = shape
    x, y = strided(shape, dtype, kind), strided((b, slots, shape[2]), dtype, kind)
    for rows in (draw_rows(b, n, slots), draw_rows(1, n, slots), draw_rows(b, n, slots).t().contiguous().t()):
        for count in (None, torch.randint(0, slots + 1, (rows.shape[0],), dtype=torch.int32)):
            for policy in FOUR:
                (got,) = gather_rows([x], rows, count, policy)
                assert torch.equal(got, reference.gather_rows(x, rows, count)), str(policy)
                new = x.clone(memory_format=torch.contiguous_format)
                scatter_rows([new], [y], rows, count, policy=policy)
                assert torch.equal(new, reference.scatter_rows(x, y, rows, count)), str(policy)


@pytest.mark.parametrize(("shape", "slots", "dtype", "kind"), MOVES[:6], ids=str)
def test_gate_and_add(shape: tuple[int, int, int], slots: int, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(slots)
    b, n, c = shape
    rows, count = draw_rows(b, n, slots), torch.full((1,), max(1, slots - 2), dtype=torch.int32)
    x, y = values(shape, dtype), strided((b, slots, c), dtype, kind)
    for gate_shape in (None, (b, slots, c), (1, slots, 1), (b, 1, c)):
        for wide in (False, True):
            for add in (False, True) if gate_shape else (True,):
                gate = None if gate_shape is None else torch.randn(gate_shape).to(F32 if wide else dtype)
                exact = reference.scatter_rows(x.double(), y.double(), rows, count, gate=gate, add=add)
                plain = reference.scatter_rows(x, y, rows, count, gate=gate, add=add)
                allowed = 2 * (plain.double() - exact).abs() + torch.finfo(dtype).eps * exact.abs() + 1e-6
                for policy in FOUR[:: 3 - wide]:
                    new = x.clone()
                    scatter_rows([new], [y], rows, count, gate=gate, add=add, policy=policy)
                    assert ((new.double() - exact).abs() <= allowed).all(), str(policy)


def test_gate_that_is_not_aligned() -> None:
    x, y, rows = torch.randn(1, 30, 16).half(), torch.randn(1, 11, 16).half(), draw_rows(1, 30, 11)
    gate = torch.randn(1, 11, 20).half()[..., 1:17]
    want = reference.scatter_rows(x, y, rows, gate=gate)
    scatter_rows([x], [y], rows, gate=gate)
    assert torch.equal(x, want)


def test_several_tensors() -> None:
    """Keys and values of unlike width and dtype at rows that all items share."""
    k, v, w = torch.randn(2, 90, 48), torch.randn(2, 90, 20).half(), torch.randn(2, 90, 4)
    rows = draw_rows(1, 90, 71)
    new = [torch.randn(2, 71, 48), torch.randn(2, 71, 20).half(), torch.randn(2, 71, 4)]
    want = [reference.scatter_rows(x, y, rows) for x, y in zip((k, v, w), new, strict=True)]
    for policy in FOUR:
        got = [k.clone(), v.clone(), w.clone()]
        scatter_rows(got, new, rows, policy=policy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        again = gather_rows(got, rows, policy=policy)
        assert all(torch.equal(a, b) for a, b in zip(again, new, strict=True))


def test_entries_that_are_not_in_use_may_hold_anything() -> None:
    x, y, rows = torch.randn(2, 50, 12), torch.randn(2, 40, 12), draw_rows(2, 50, 40)
    count = torch.tensor([7, 40], dtype=torch.int32)
    rows[0, 7:14], rows[0, 14:] = rows[0, :7], WILD.repeat(7)[:26]
    y[0, 7:] = torch.nan
    got = x.clone()
    scatter_rows([got], [y], rows, count, policy=RANDOMS[1])
    assert torch.equal(got, reference.scatter_rows(x, y, rows, count)) and got.isfinite().all()
    assert not gather_rows([x], rows, count)[0][0, 7:].any()


def test_damaged_lists_stay_inside_the_tensors() -> None:
    """Wrong rows are left out; every access is inside: the buffers end at unmapped pages."""
    x, rows = torch.randn(2, 50, 12), draw_rows(2, 50, 40)
    rows[:, ::3] = WILD.repeat(7)[:28].view(2, 14)
    for count in (None, torch.tensor([2**31 - 1, -5], dtype=torch.int32)):
        (got,) = gather_rows([x], rows, count, RANDOMS[0])
        assert not got[:, ::3].any() and got[0, 1].any()
        for add in (False, True):
            new = x.clone()
            scatter_rows([new], [got], rows, count, add=add)
            assert new.isfinite().all() and (add or torch.equal(new, x))
    assert not got[1].any()


def test_nothing_to_do_and_too_much() -> None:
    none = torch.zeros(1, 0, dtype=torch.int32)
    gather_rows([torch.randn(2, 5, 4)], none)
    gather_rows([torch.zeros(0, 5, 4)], draw_rows(1, 5, 3))
    with pytest.raises(EmulatorError, match="error code 1"):
        gather_rows([torch.zeros(1, 1, (1 << 22) + 1)], torch.zeros(1, 1, dtype=torch.int32))
