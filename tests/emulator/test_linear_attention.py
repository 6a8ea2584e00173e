"""The kernels of linear attention (csrc/kernels/linear), emulated."""

from __future__ import annotations

import pytest
import torch
from emulator_linear_attention import linear_attention_readout, linear_attention_state
from linear_cases import (
    BF16,
    CASES,
    F16,
    F32,
    LinearCase,
    build,
    check_out,
    check_state,
    eager,
    eager_readout,
    eager_state,
    no_worse,
    state_errors,
    widened,
)  # fmt: skip

from emulator import POLICIES, RANDOMS, EmulatorError, stats
from vdit_fast import reference


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case_under_every_policy(case: LinearCase) -> None:
    problem = build(case)
    first = None
    for policy in POLICIES:
        state = linear_attention_state(problem.k, problem.v, **problem.state_options, splits=2, policy=policy)
        out = linear_attention_readout(problem.q, state, **problem.readout_options, policy=policy)
        try:
            check_state(problem, state)
            check_out(problem, out)
            first = first or (state, out)
            assert torch.equal(state, first[0]) and torch.equal(out, first[1]), "bits differ from the first policy's"
        except AssertionError as error:
            raise AssertionError(f"{case.name}, policy {policy}: {error}") from None


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("splits", [0, 1, 3, 7, 40])
def test_parts_add_up(splits: int, dtype: torch.dtype, feature_map: str) -> None:
    """Any number of parts, also more than there are stages, gives the state up to the order of sums."""
    problem = build(LinearCase("parts", lk=330, heads=1, kv_heads=1, dtype=dtype, feature_map=feature_map))
    one = linear_attention_state(problem.k, problem.v, **problem.state_options, splits=1)
    state = linear_attention_state(problem.k, problem.v, **problem.state_options, splits=splits, policy=RANDOMS[0])
    check_state(problem, state)
    for error, own in zip(state_errors(state, one.double()), problem.wide_state_error, strict=True):
        assert error <= 2 * own + torch.finfo(F32).eps  # two orders of fp32 sums of the same features


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_constant_value_comes_back(dim: int, dtype: torch.dtype) -> None:
    """L1c: the weights of a row sum to 1, with the rounded features too."""
    problem = build(LinearCase("constant", dim=dim, dim_v=dim, dtype=dtype, lk=140))
    v = torch.randn(dim).to(dtype).expand_as(problem.v).contiguous()
    state = linear_attention_state(problem.k, v, **problem.state_options)
    out = linear_attention_readout(problem.q, state, **problem.readout_options)
    twin = eager(problem.q, problem.k, v, problem.state_options, problem.readout_options)
    no_worse(out, twin, v[:, :1].expand_as(out).double())


@pytest.mark.parametrize("far", [-120.0, 120.0])
@pytest.mark.parametrize("dim", [40, 96])
def test_features_far_from_0(dim: int, far: float) -> None:
    """Softmax does not see what all its columns have in common: columns that do not exist must have no say."""
    problem = build(LinearCase("far", dim=dim, dim_v=64))
    for x in (problem.q, problem.k):
        x[..., 0] = 1
    near = problem.state_options["weight"].clone()
    near[:, 0] = 0
    away = near.clone()
    away[:, 0] = far  # is added to every column of x W
    options = {**problem.state_options, "weight": near}, {**problem.readout_options, "weight": near}
    twin = eager_state(problem.k, problem.v, options[0])
    want = reference.linear_attention_state(problem.k.double(), problem.v.double(), **widened(options[0]))
    state = linear_attention_state(problem.k, problem.v, **{**options[0], "weight": away})
    for part in (slice(None, -1), slice(-1, None)):
        no_worse(state[..., part], twin[..., part], want[..., part])
    out = linear_attention_readout(problem.q, state, **{**options[1], "weight": away})
    exact = reference.linear_attention_readout(problem.q.double(), want, **widened(options[1]))
    no_worse(out, eager_readout(problem.q, twin, options[1]), exact)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_no_key_and_no_feature_give_zero(dtype: torch.dtype) -> None:
    problem = build(LinearCase("dead", feature_map="relu", dtype=dtype, batch=2, kv_len=(150, 0)))
    problem.q[0, 3] = -1
    state = linear_attention_state(problem.k, problem.v, **problem.state_options)
    assert not state[1].any()
    for eps in (0.0, 1e-15):
        out = linear_attention_readout(problem.q, state, **problem.readout_options, eps=eps)
        assert not out[1].any() and not out[0, 3].any() and out[0, 4].all()


@pytest.mark.parametrize("eps", [0.5, 100.0])
def test_eps_is_added(eps: float) -> None:
    for case in (
        LinearCase("eps"),
        LinearCase("eps-fp32", dtype=F32),
        LinearCase("eps-relu", feature_map="relu", dtype=F16),
    ):
        problem = build(case)
        options = problem.readout_options
        want = reference.linear_attention_readout(problem.q.double(), problem.want_state, **widened(options), eps=eps)
        out = linear_attention_readout(problem.q, problem.want_state.float(), **options, eps=eps)
        no_worse(out, eager_readout(problem.q, problem.want_state, {**options, "eps": eps}), want)


@pytest.mark.parametrize("feature_map", ["identity", "relu"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_sums_that_cancel(dim: int, dtype: torch.dtype, feature_map: str) -> None:
    """Rows of the state whose sum is smaller than what rounding them leaves over."""
    q, state = torch.zeros(1, 1, 1, dim, dtype=dtype), torch.zeros(1, 1, dim, dim + 1)
    one, other = torch.randn(2, dim)
    for row, values in ((3, one), (dim - 5, other * 2.0**-9 - one)):
        q[..., row] = 1
        state[..., row, :-1], state[..., row, -1] = values, 0.5
    want = state.double().sum(2)[:, None, :, :-1]
    out = linear_attention_readout(q, state, feature_map=feature_map)
    rounding = torch.finfo(dtype).eps / 2
    assert ((out - want).abs() <= rounding * want.abs() + 4 * rounding**2 * one.abs() + 2.0**-24).all()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    for feature_map in ("hedgehog", "relu", "elu"):
        problem = build(LinearCase("nan", dtype=dtype, feature_map=feature_map))
        state = linear_attention_state(problem.k, problem.v, **problem.state_options)
        clean = linear_attention_readout(problem.q, state, **problem.readout_options)
        problem.q[0, 5] = torch.nan
        out = linear_attention_readout(problem.q, state, **problem.readout_options)
        assert out[0, 5].isnan().all()
        out[0, 5] = clean[0, 5]
        assert torch.equal(out, clean)


def test_matrices_without_bank_conflicts() -> None:
    problem = build(LinearCase("conflicts", dim=128, dim_v=128, lk=128))
    stats("linear_attention")
    state = linear_attention_state(problem.k, problem.v, **problem.state_options)
    linear_attention_readout(problem.q, state, **problem.readout_options)
    counted = stats("linear_attention")
    assert counted.mma > 0 and counted.ldmatrix > 0 and counted.ldmatrix_conflicts == 0, counted


def test_wild_lengths_stay_inside_the_tensors() -> None:
    problem = build(LinearCase("wild", batch=2))
    for kv_len in (torch.tensor([-3, 2**31 - 1], dtype=torch.int32), torch.tensor([-(2**62), 2**62])):
        state = linear_attention_state(problem.k, problem.v, **{**problem.state_options, "kv_len": kv_len})
        assert not state[0].any()
        assert max(state_errors(state[1:], problem.want_state[1:])) < 2 * max(problem.state_error)


@pytest.mark.parametrize(("batch", "lq", "lk"), [(0, 5, 5), (1, 0, 5), (2, 5, 0)])
def test_empty_tensors(batch: int, lq: int, lk: int) -> None:
    q, k = torch.randn(batch, lq, 2, 64).to(BF16), torch.randn(batch, lk, 2, 64).to(BF16)
    state = linear_attention_state(k, k)
    assert state.shape == (batch, 2, 128, 65) and (lk > 0 or not state.any())
    out = linear_attention_readout(q, state)
    assert out.shape == q.shape and (lk > 0 or not out.any())


def test_calls_the_kernel_cannot_serve_are_refused() -> None:
    x = torch.randn(1, 3, 1, 257).to(BF16)
    y = torch.randn(1, 3, 1, 64).to(BF16)
    for k, v in ((x, y), (y, x)):
        with pytest.raises(EmulatorError, match="error code 1"):
            linear_attention_state(k, v, feature_map="relu")
    with pytest.raises(EmulatorError, match="error code 1"):
        linear_attention_state(y, y, splits=-1)
