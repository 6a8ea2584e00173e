"""The rule of the search: errors, costs and thresholds to a mode."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdit_fast.planners import SparseVDiT
from vdit_fast.tune.choice import choose, measure_costs, relative_errors

COSTS = [0.02, 0.3, 0.35, 0.25]  # skip, diagonal, multi-diagonal, vertical
ERRORS = torch.rand(5, 7, 4, generator=torch.Generator().manual_seed(0))


def test_negative_limit_keeps_everything_full():
    assert (choose(ERRORS, COSTS, 0.5, -1e-9) == -1).all() and (choose(ERRORS * 0, COSTS, 0, -1e-9) == -1).all()


def test_without_price_and_limit_it_is_the_least_error():
    assert torch.equal(choose(ERRORS, COSTS, 0.0, math.inf), ERRORS.argmin(-1))


def test_an_infinite_price_skips_every_head():
    assert (choose(ERRORS, [0.0, *COSTS[1:]], 1e9, math.inf) == 0).all()
    assert (choose(ERRORS, COSTS, 1e9, math.inf) == 0).all()


@given(price=st.floats(0, 10), limit=st.floats(-1, 10))
def test_the_rule_word_by_word(price, limit):
    got = choose(ERRORS, COSTS, price, limit)
    for place, errors in enumerate(ERRORS.reshape(-1, 4).tolist()):
        loss = [e + price * c for e, c in zip(errors, COSTS, strict=True)]
        want = -1 if all(x > limit for x in loss) else loss.index(min(loss))
        assert int(got.reshape(-1)[place]) == want


def test_ties_go_to_the_cheaper_and_nothing_slow_or_broken_is_taken():
    assert choose(torch.zeros(4), COSTS, 0.0, math.inf) == 0
    assert choose(torch.tensor([1.0, 0.5, 0.5, 0.5]), COSTS, 0.0, math.inf) == 3
    assert choose(torch.tensor([1.0, 0.0, 0.1, 0.2]), [0.1, 1.0, 0.9, 0.5], 0.0, math.inf) == 2
    assert choose(torch.tensor([1.0, 0.0]), [1.2, 1.0], 0.0, math.inf) == -1
    assert choose(torch.tensor([math.inf, math.nan, 0.5]), [0.1, 0.2, 0.3], 0.0, math.inf) == 2
    assert choose(torch.tensor([math.inf, math.nan]), [0.1, 0.2], 0.0, math.inf) == -1


def test_relative_errors_leave_padding_out():
    exact, out = torch.randn(2, 2, 10, 3, 4).unbind()
    kv_len = torch.tensor([10, 6])
    valid = torch.ones(2, 10, 1, 1)
    valid[1, 6:] = 0
    want = ((out - exact).square() * valid).sum((0, 1, 3)) / (exact.square() * valid).sum((0, 1, 3))
    found = relative_errors(exact, {"a": out, "b": None, "c": exact}, kv_len)
    torch.testing.assert_close(found["a"].float(), want)
    assert (found["b"] == 1).all() and (found["c"] == 0).all()
    for x in (exact, out):  # what padding rows hold may be anything
        x[1, 6], x[1, 7:] = math.nan, math.inf
    again = relative_errors(exact, {"a": out, "b": None, "c": exact}, kv_len)
    assert all(torch.equal(again[name], found[name]) for name in "abc")
    exact[:, :, 1] = 0
    found = relative_errors(exact, {"a": out, "b": None}, kv_len)
    assert found["b"].tolist() == [1, 0, 1] and found["a"][1] == math.inf


def test_costs_are_times_over_dense(context):
    ctx = context((8, 12, 12))
    q, k, v = torch.randn(3, 1, ctx.num_tokens, 2, 32).unbind()
    plans = {mode: SparseVDiT(modes=mode).plan(q, k, ctx) for mode in ("skip", "diagonal")}
    costs = measure_costs(plans, q, k, v, None, 3)
    assert set(costs) == set(plans) and 0 < costs["skip"] < min(costs["diagonal"], 0.9)


@pytest.fixture
def context():
    from vdit_fast.context import LayerContext

    return lambda grid: LayerContext(0, 1, "a", grid, math.prod(grid))
