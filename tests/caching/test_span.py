"""The sum of what blocks add: read late where it may be, and never wrong; factors in other places and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdit_fast.caching import budget
from vdit_fast.caching.span import Sum
from vdit_fast.caching.stream import Factors
from vdit_fast.caching.taylorseer import TaylorSeer


def value(total: Sum) -> Tensor:
    output, minus = total.result()
    return output if minus is None else output - minus


@pytest.mark.parametrize("late", [True, False])
def test_sums_with_and_without_something_between(late: bool) -> None:
    adds = torch.randn(5, 3, 4, dtype=torch.float64)
    between = torch.randn(5, 3, 4, dtype=torch.float64)
    for broken in (set(), {2}, {0}, {4}, {0, 1, 2, 3}):  # something is added after these blocks
        total, x = Sum(), torch.randn(3, 4, dtype=torch.float64)
        for index in range(5):
            y = x + adds[index]
            total.add(x, y, late)
            x = y + between[index] if index in broken else y
        torch.testing.assert_close(value(total), adds.sum(0))
        assert not total.lost


def test_a_chain_costs_two_reads_and_no_memory() -> None:
    total, x = Sum(), torch.randn(3, 4)
    first = x
    for _ in range(4):
        y = x + torch.randn(3, 4)
        total.add(x, y, late=True)
        x = y
    output, minus = total.result()
    assert output is x and minus is first


def test_changes_in_place_are_noticed() -> None:
    for when in ("between", "at the end", "the first input"):
        total, x = Sum(), torch.randn(3, 4)
        y = x + 1
        total.add(x, y, late=True)
        if when == "the first input":
            x.mul_(2)
        elif when == "between":
            y.mul_(2)
        z = y + 1
        total.add(y, z, late=True)
        if when == "at the end":
            z.mul_(2)
        total.result()
        assert total.lost, when


def test_half_precision_sums_are_wide() -> None:
    total, x = Sum(), torch.full((8,), 256.0, dtype=torch.bfloat16)
    for _ in range(4):
        total.add(x, x + 1, late=False)
    found = value(total)
    assert found.dtype == torch.float32 and torch.equal(found, 4 * ((x + 1).float() - x.float()))


def test_inference_tensors_are_read_at_once() -> None:
    with torch.inference_mode():
        total, x = Sum(), torch.randn(3, 4)
        y = x + 1
        total.add(x, y, late=True)
        y.mul_(2)  # leaves no trace in a version counter
        z = y + 1
        total.add(y, z, late=True)
        torch.testing.assert_close(value(total), torch.full((3, 4), 2.0))


@pytest.mark.parametrize("storage", ["auto", "fp32", "bf16"])
def test_closed_form_and_storage(storage: str) -> None:
    for granularity in ("model", "block"):
        policy = TaylorSeer(order=2, storage=storage, granularity=granularity)
        dtype = budget.storage_dtype(policy, torch.bfloat16)
        assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}.get(
            storage, torch.float32 if granularity == "model" else torch.bfloat16
        )
        factors = Factors((5, 7), policy.degree, dtype, torch.device("cpu"))
        assert factors.nbytes == budget.nbytes(policy, 35, torch.bfloat16) == 3 * 35 * dtype.itemsize


def test_offloaded_factors_forecast_the_same() -> None:
    xs = torch.randn(4, 5, 7)
    here, away = (Factors((5, 7), 2, torch.float32, torch.device("cpu"), offload) for offload in (False, True))
    for step, x in enumerate(xs):
        here.update(step, x)
        away.update(step, x)
    for weights in ([1.0], [1.0, 0.5], [1.0, 0.5, 0.1]):
        assert torch.equal(here.forecast(weights, torch.float32), away.forecast(weights, torch.float32))


@pytest.mark.gpu
def test_offloaded_factors_lie_in_pinned_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device, xs = torch.device("cuda"), torch.randn(4, 64, 96, device="cuda")
    here, away = (Factors((64, 96), 2, torch.float32, device, offload) for offload in (False, True))
    before = torch.cuda.memory_allocated()
    for step, x in enumerate(xs):
        here.update(step, x)
        away.update(step, x)
        found = [factors.added_to(x, [1.0, 0.5, 0.1][: factors.known]) for factors in (here, away)]
        assert torch.equal(*found)
    del found
    assert away._kept[0].is_pinned() and torch.cuda.memory_allocated() <= before
    assert away.nbytes == here.nbytes


def test_a_step_that_is_not_later_begins_anew() -> None:
    factors = Factors((3,), 1, torch.float32, torch.device("cpu"))
    for step in (0, 1, 2):
        factors.update(step, torch.randn(3))
    assert factors.known == 2
    x = torch.randn(3)
    factors.update(2, x)
    assert factors.known == 1 and torch.equal(factors.forecast([1.0], torch.float32), x)
