"""Rows added up by weight, against their torch twin and closed forms, as an operator, and with bad input."""

from __future__ import annotations

import pytest
import torch
from combine_cases import BF16, DTYPES, F16, F32, check, draw
from torch import Tensor

from vdit_fast import ops, reference

DIMS = [1, 7, 8, 13, 64, 129, 264]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_equals_the_reference(k: int, dim: int, dtype: torch.dtype) -> None:
    for parts in (0, 3, 6, 9, 12, 15):
        check(ops.combine_rows, draw(dim, dtype, k, parts, seed=parts + k))


def test_closed_forms() -> None:
    rows = torch.randn(5, 12)
    slots = torch.tensor([[4], [0], [4]], dtype=torch.int32)
    assert torch.equal(ops.combine_rows(rows, slots), rows[[4, 0, 4]])
    twice = ops.combine_rows(rows, torch.tensor([[1, 1]], dtype=torch.int32), torch.tensor([[0.5, 0.5]]))
    assert torch.equal(twice, rows[1:2])
    # weights are taken as they are: a token's need not sum to 1
    quarter = ops.combine_rows(rows, torch.tensor([[2, 3]], dtype=torch.int32), torch.tensor([[0.25, 0.0]]))
    torch.testing.assert_close(quarter, 0.25 * rows[2:3])
    base, residual, gate = torch.randn(3, 4, 12).unbind()
    slots = torch.tensor([[0, 1]] * 4, dtype=torch.int32)
    want = residual + gate[:2].repeat_interleave(2, 0) * (base + rows[0] + rows[1])
    torch.testing.assert_close(ops.combine_rows(rows, slots, base=base, residual=residual, gate=gate[:2]), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_anything_is_its_residual(dtype: torch.dtype) -> None:
    rows, residual = torch.randn(3, 40).to(dtype), torch.randn(6, 40).to(dtype)
    residual[1, 3], residual[1, 4] = torch.nan, -0.0
    gate = torch.full((2, 40), torch.inf, dtype=dtype)
    slots = torch.full((6, 2), -1, dtype=torch.int32)
    slots[5] = 2
    got = ops.combine_rows(rows.fill_(torch.nan), slots, residual=residual, gate=gate)
    same = [x[:5].view(torch.int32 if dtype == F32 else torch.int16) for x in (got, residual)]
    assert torch.equal(*same) and got[5].isnan().all()
    assert not ops.combine_rows(rows, slots)[:5].any()
    nothing = ops.combine_rows(rows[:0], slots[:5], residual=residual[:5])
    assert torch.equal(nothing.isnan(), residual[:5].isnan())


def test_edges_and_strides() -> None:
    slots = torch.zeros(0, 2, dtype=torch.int32)
    empty = torch.randn(0, 8)
    assert ops.combine_rows(torch.randn(3, 8), slots, base=empty, gate=torch.randn(2, 8)).shape == (0, 8)
    assert ops.combine_rows(torch.randn(3, 0), torch.zeros(4, 1, dtype=torch.int32)).shape == (4, 0)
    wide = torch.randn(15, 3, 50)
    kwargs = draw(33, F32, 2, 15, seed=4)
    names = ("rows", "base", "residual")
    strided = {name: wide[: len(kwargs[name]), i, 5:38].copy_(kwargs[name]) for i, name in enumerate(names)}
    assert torch.equal(ops.combine_rows(**kwargs | strided), ops.combine_rows(**kwargs))


def test_nan_stays_in_its_row() -> None:
    for dtype in DTYPES:
        rows = torch.randn(4, 40).to(dtype)
        rows[2, 7] = torch.nan
        slots = torch.tensor([[0, 1], [2, 0], [3, 1]], dtype=torch.int32)
        found = ops.combine_rows(rows, slots, torch.rand(3, 2)).isnan()
        assert found.sum() == 1 and found[1, 7]


def test_threads_and_repeats_change_nothing() -> None:
    kwargs = draw(72, BF16, 3, 15, rows=900)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.combine_rows(**kwargs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, results[0]) for x in results)


def test_gradients_come_from_the_reference() -> None:
    kwargs = {name: x.double() if x.is_floating_point() else x for name, x in draw(5, F32, 2, 15, rows=6).items()}
    slots = kwargs.pop("slots")
    names = list(kwargs)
    leaves = [kwargs[name].requires_grad_() for name in names]

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return ops.combine_rows(given.pop("rows"), slots, **given)

    assert torch.autograd.gradcheck(call, leaves)
    with torch.no_grad():
        assert not ops.combine_rows(torch.randn(9, 5, requires_grad=True), slots.clamp(max=8)).requires_grad


def test_raw_operator_and_compile() -> None:
    kwargs = draw(24, F16, 2, 15)
    raw = [kwargs[name] for name in ("rows", "slots", "weights", "base", "residual", "gate")]
    torch.library.opcheck(torch.ops.vdit_fast.combine_rows, tuple(raw))
    torch.library.opcheck(torch.ops.vdit_fast.combine_rows, (*raw[:2], None, None, None, None))
    with pytest.raises(RuntimeError, match="combine_rows: the raw operator has no gradient"):
        torch.ops.vdit_fast.combine_rows(raw[0].requires_grad_(), *raw[1:]).sum().backward()
    with torch.no_grad():
        compiled = torch.compile(ops.combine_rows, fullgraph=True)
        assert torch.equal(compiled(**kwargs), ops.combine_rows(**kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.randn(4, 8, 1)}, "rows has shape"),
        ({"rows": torch.empty(0, 2**29)}, "dim below 536870912"),
        ({"rows": torch.randn(4, 8, dtype=torch.float64)}, "rows is float64"),
        ({"slots": torch.zeros(6, 9, dtype=torch.int32)}, "slots has shape .6, 9."),
        ({"slots": torch.zeros(6, 0, dtype=torch.int32)}, "slots has shape"),
        ({"slots": torch.zeros(6, 2, dtype=torch.int64)}, "slots is int64; convert"),
        ({"slots": torch.zeros(2, 6, dtype=torch.int32).T}, "slots must be contiguous"),
        ({"slots": torch.full((6, 2), 4, dtype=torch.int32)}, "slot 4 of row 0 is outside the 4 rows"),
        ({"weights": torch.rand(6, 1)}, "weights has shape .6, 1.; expected that of slots"),
        ({"weights": torch.rand(6, 2).half()}, "weights is float16; convert it to float32"),
        ({"base": torch.randn(5, 8)}, "base has shape .5, 8.; expected .6, 8."),
        ({"residual": torch.randn(6, 8).half()}, "residual is float16 but rows is float32"),
        ({"residual": torch.randn(8, 6).T}, "residual has stride 6"),
        ({"gate": torch.randn(4, 8)}, "gate has shape .4, 8.; expected one row for each of equal parts"),
        ({"gate": torch.randn(3, 9)}, "gate has shape .3, 9."),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    good = {"rows": torch.randn(4, 8), "slots": torch.zeros(6, 2, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=message):
        ops.combine_rows(**good | change)


def test_reference_of_fp64_is_fp64() -> None:
    kwargs = {name: x.double() if x.is_floating_point() else x for name, x in draw(5, F32, 2, 15).items()}
    assert reference.combine_rows(**kwargs).dtype == torch.float64


def test_weights_of_absent_rows_do_not_reach_gradients() -> None:
    rows = torch.randn(1, 4, requires_grad=True)
    weights = torch.tensor([[1.0], [torch.nan]])
    out = ops.combine_rows(rows, torch.tensor([[0], [-1]], dtype=torch.int32), weights)
    out.sum().backward()
    assert rows.grad is not None and rows.grad.isfinite().all()
