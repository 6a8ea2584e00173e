"""Linear attention against the explicit matrix in fp64: values, layouts, lengths, the state, bad input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
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
    eager_features,
    eager_state,
    no_worse,
    wide_state,
    widened,
)  # fmt: skip
from torch import Tensor

import vdit_fast
from vdit_fast import reference
from vdit_fast.ops import linear_attention, linear_attention_readout, linear_attention_state

MAPS = ["hedgehog", "relu", "elu", "identity"]
STATE_OPTIONS: dict[str, Any] = {"feature_map": "hedgehog", "weight": None, "k_den": None, "kv_len": None}
HEDGEHOG = {**STATE_OPTIONS, "q_den": None}


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_as_exact_as_torch(case: LinearCase) -> None:
    problem = build(case)
    state = linear_attention_state(problem.k, problem.v, **problem.state_options)
    check_state(problem, state, wide=True)
    out = linear_attention_readout(problem.q, state, **problem.readout_options)
    check_out(problem, out, wide=True)
    assert torch.equal(linear_attention(problem.q, problem.k, problem.v, **problem.options), out)


@pytest.mark.parametrize("case", [c for c in CASES if c.kv_len is None], ids=lambda c: c.name)
def test_equals_the_normalised_matrix(case: LinearCase) -> None:
    """L1a, for the reference of the state and so for everything that is compared with it."""
    problem = build(case)
    options = widened(problem.options)
    want = reference.linear_attention(*(x.double() for x in (problem.q, problem.k, problem.v)), **options)
    torch.testing.assert_close(problem.want, want, rtol=1e-9, atol=1e-11)


def test_weights_of_hedgehog() -> None:
    """Each half of the features sums to 1, so that the products of N keys lie in (0, 2 N]."""
    problem = build(LinearCase("halves", dim=24, dtype=F32, lk=130))
    state = linear_attention_state(problem.k, problem.v, **problem.state_options)
    twin = eager_state(problem.k, problem.v, problem.state_options)
    halves, twin_halves = (x[..., -1].unflatten(-1, (2, -1)).sum(-1) for x in (state, twin))
    no_worse(halves, twin_halves, torch.full_like(halves, 130).double())
    phi = eager_features(problem.q.double(), "hedgehog", problem.readout_options["weight"].double())
    total = torch.einsum("blhf,bhf->blh", phi, state[..., -1].double())
    rounded = float((halves.double() / 130).max())
    assert (total > 0).all() and (total <= 2 * 130 * rounded).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_a_constant_value_comes_back(feature_map: str, dtype: torch.dtype) -> None:
    """L1c."""
    problem = build(LinearCase("constant", dim=40, dim_v=24, dtype=dtype, feature_map=feature_map))
    v = draw(24, dtype=dtype).expand(1, 150, 2, 24)
    out = linear_attention(problem.q, problem.k, v, **problem.options)
    twin = eager(problem.q, problem.k, v, problem.state_options, problem.readout_options)
    no_worse(out, twin, v[:, :1].expand_as(out).double())


@pytest.mark.parametrize("feature_map", MAPS)
def test_states_add_up_and_keys_have_no_order(feature_map: str) -> None:
    """L1d, over shards of unequal lengths, one of them empty."""
    problem = build(LinearCase("additive", dtype=F32, feature_map=feature_map, lk=211))
    options = {**problem.state_options}
    whole = linear_attention_state(problem.k, problem.v, **options)
    cuts = [0, 1, 97, 97, 211]
    shards = [linear_attention_state(problem.k[:, a:b], problem.v[:, a:b], **options) for a, b in pairwise(cuts)]
    order = torch.randperm(211, generator=torch.Generator().manual_seed(1))
    mixed = linear_attention_state(problem.k[:, order], problem.v[:, order], **options)
    for state in (whole, torch.stack(shards).sum(0), mixed):
        check_state(problem, state, wide=True)
        check_out(problem, linear_attention_readout(problem.q, state, **problem.readout_options), wide=True)
    out = linear_attention(problem.q, problem.k[:, order], problem.v[:, order], **problem.options)
    check_out(problem, out, wide=True)


@pytest.mark.parametrize("length", [3071, 3072, 4609, 30000])
def test_parts_of_a_long_sequence(length: int) -> None:
    """Lengths at which the CPU kernel cuts a sequence into one, two, three and the most parts."""
    k, v = draw(1, length, 1, 9), draw(1, length, 1, 5, seed=1)
    weight = draw(9, 9, seed=2)
    for n in (length, 1, length // 2, length - 1):
        state = linear_attention_state(k, v, weight=weight, kv_len=None if n == length else torch.tensor([n]))
        twin = wide_state(k[:, :n], v[:, :n], {**STATE_OPTIONS, "weight": weight})
        want = reference.linear_attention_state(k[:, :n].double(), v[:, :n].double(), weight=weight.double())
        for part in (slice(None, -1), slice(-1, None)):
            no_worse(state[..., part], twin[..., part], want[..., part])


def test_the_same_bits_for_any_number_of_threads_and_any_batch() -> None:
    q, k, v = draw(2, 5000, 2, 16), draw(2, 5000, 2, 16, seed=1), draw(2, 5000, 2, 16, seed=2)
    out = linear_attention(q, k, v)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(linear_attention(q, k, v), out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(linear_attention(q[1:], k[1:], v[1:]), out[1:])
    assert torch.equal(linear_attention(*(x[:, :, 1:] for x in (q, k, v))), out[:, :, 1:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_batch_items_of_their_own_length(dtype: torch.dtype) -> None:
    problem = build(LinearCase("lengths", batch=4, lk=120, kv_len=(120, 1, 0, 97), dtype=dtype))
    out = linear_attention(problem.q, problem.k, problem.v, **problem.options)
    options = {**problem.options, "kv_len": None}
    for b, n in enumerate((120, 1, 0, 97)):
        alone = linear_attention(*(x[b : b + 1] for x in (problem.q, problem.k[:, :n], problem.v[:, :n])), **options)
        assert torch.equal(out[b : b + 1], alone)
    assert not out[2].any() and out[1].any()


@pytest.mark.parametrize("eps", [0.0, 1e-15])
def test_rows_without_a_denominator_are_zero(eps: float) -> None:
    q, k, v = -draw(1, 9, 1, 8).abs(), draw(1, 20, 1, 8), draw(1, 20, 1, 4)
    q[0, 4] = 1
    for function in (linear_attention, reference.linear_attention):
        out = function(q, k, v, feature_map="relu", eps=eps)
        assert out[0, 4].all() and not out[0, :4].any() and not out[0, 5:].any()
    assert linear_attention(q, k[:, :0], v[:, :0]).eq(0).all()


def test_eps_is_added() -> None:
    q, k, v = draw(1, 9, 2, 8), draw(1, 20, 2, 8, seed=1), draw(1, 20, 2, 4, seed=2)
    for eps in (0.5, 100.0):
        want = reference.linear_attention(q.double(), k.double(), v.double(), eps=eps)
        no_worse(linear_attention(q, k, v, eps=eps), eager(q, k, v, HEDGEHOG, {**HEDGEHOG, "eps": eps}), want)


@pytest.mark.parametrize("feature_map", MAPS)
def test_nan_stays_in_its_row(feature_map: str) -> None:
    q, k, v = draw(1, 9, 1, 8).abs(), draw(1, 20, 1, 8).abs(), draw(1, 20, 1, 4)
    clean = linear_attention(q, k, v, feature_map=feature_map)
    full = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN that GPUs make
    for at, nan in ((0, torch.tensor(torch.nan)), (7, full)):
        broken = q.clone()
        broken[0, 3, 0, at] = nan
        out = linear_attention(broken, k, v, feature_map=feature_map)
        assert out[0, 3].isnan().all()
        out[0, 3] = clean[0, 3]
        assert torch.equal(out, clean)
    broken = k.clone()
    broken[0, 3, 0, 2] = full
    assert linear_attention(q, broken, v, feature_map=feature_map).isnan().all()


def test_a_long_sequence_on_sampled_rows() -> None:
    """The acceptance line in small: 20,000 tokens; benchmarks/linear_attention.py has 40 x 75,600 x 128."""
    for dtype in (F32, BF16):
        q, k, v = (draw(1, 20_000, 1, 64, dtype=dtype, seed=i) for i in range(3))
        weight = 1.5 / 8 * draw(64, 64, seed=3)
        rows = torch.arange(0, 20_000, 997)
        out = linear_attention(q, k, v, q_weight=weight, k_weight=weight)[:, rows]
        wide = {"q_weight": weight.double(), "k_weight": weight.double()}
        want = reference.linear_attention(q[:, rows].double(), k.double(), v.double(), **wide)
        options = {**HEDGEHOG, "weight": weight}
        twin = eager(q[:, rows], k, v, options, options)
        no_worse(out, twin, want)
        assert (out.double() - want).abs().max() <= 2 * (twin.double() - want).abs().max()


def test_opcheck_and_compile() -> None:
    def leaf(x: Tensor) -> Tensor:
        return x.requires_grad_()

    k, v = leaf(draw(2, 7, 2, 8)), leaf(draw(2, 7, 2, 4))
    weight, kv_len = leaf(draw(2, 8, 8)), torch.tensor([7, 3])
    q, state = leaf(draw(2, 5, 4, 8)), leaf(draw(2, 2, 16, 5).abs())
    ops = torch.ops.vdit_fast
    torch.library.opcheck(ops.linear_attention_state, (k, v, 0, weight, None, kv_len))
    torch.library.opcheck(ops.linear_attention_state, (k, v, 2, None, leaf(draw(2, 7, 2, 8)), None))
    torch.library.opcheck(ops.linear_attention_readout, (q, state, 0, leaf(draw(4, 8, 8)), None, 1e-15))
    torch.library.opcheck(
        ops.linear_attention_readout, (q, leaf(draw(2, 2, 8, 5).abs()), 1, None, leaf(q.detach().abs()), 0.5)
    )

    def run(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return linear_attention(q, k, v, k_weight=w, kv_len=kv_len)

    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(q, k, v, weight), run(q, k, v, weight))


def test_forward_mode_is_refused() -> None:
    x = draw(1, 5, 1, 8)
    for call in (lambda x: linear_attention(x, x, x), lambda x: linear_attention_state(x, x)):
        with pytest.raises(RuntimeError, match=r"linear_attention.* has no forward-mode derivative"):
            torch.func.jvp(call, (x,), (x,))


def test_it_is_public() -> None:
    assert vdit_fast.linear_attention is linear_attention


Q, K, V = draw(2, 5, 4, 8), draw(2, 7, 2, 8), draw(2, 7, 2, 6)
STATE = draw(2, 2, 16, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_attention(Q, K, V, feature_map="exp"), ValueError, "feature_map is 'exp'; expected one of"),
        (lambda: linear_attention(Q, K, V, feature_map="relu", q_weight=Q), ValueError, "q_weight is given"),
        (lambda: linear_attention_state(K, V, feature_map="elu", weight=K), ValueError, "weight is given"),
        (lambda: linear_attention(Q.double(), K.double(), V.double()), RuntimeError, "float64; convert"),
        (lambda: linear_attention(Q, K.half(), V), RuntimeError, "v is float32 but k is float16"),
        (lambda: linear_attention(Q, K, V[:, :5]), RuntimeError, r"v has shape \[2, 5, 2, 6\] but k has"),
        (lambda: linear_attention(Q[0], K, V), RuntimeError, r"q has shape \[5, 4, 8\]"),
        (lambda: linear_attention(Q[..., ::2], K, V), RuntimeError, "q has stride 2 in its last dimension"),
        (lambda: linear_attention(Q[:, :, :3], K, V), RuntimeError, "3 query heads are not a multiple of the 2"),
        (lambda: linear_attention(Q[..., :6], K, V), RuntimeError, r"state has shape .*expected .*\[2, kv heads, 12"),
        (lambda: linear_attention(Q, K, V, k_weight=draw(3, 8, 8)), RuntimeError, r"weight has shape \[3, 8, 8\]; exp"),
        (lambda: linear_attention(Q, K, V, k_weight=draw(8, 8).half()), RuntimeError, "weight is float16 but the tok"),
        (lambda: linear_attention(Q, K, V, q_weight=draw(8, 8).T), RuntimeError, "weight has stride 8 in its last"),
        (lambda: linear_attention(Q, K, V, k_den=K[:, :3]), RuntimeError, r"k_den has shape .* expected that of k"),
        (lambda: linear_attention(Q, K, V, q_den=Q.half()), RuntimeError, "q_den is float16 but q is float32"),
        (lambda: linear_attention(Q, K, V, kv_len=torch.tensor([1, 8])), RuntimeError, r"kv_len\[1\] is 8; expected 0"),
        (lambda: linear_attention(Q, K, V, kv_len=torch.tensor([1])), RuntimeError, r"kv_len has shape \[1\]"),
        (lambda: linear_attention(Q, K, V, kv_len=torch.ones(2)), RuntimeError, "kv_len is float32; expected int32"),
        (lambda: linear_attention(Q, K, V, eps=-1.0), RuntimeError, "eps is -1; expected a finite number"),
        (lambda: linear_attention(Q, K, V, eps=torch.nan), RuntimeError, "eps is nan"),
        (lambda: linear_attention_readout(Q, STATE.double()), RuntimeError, "state is float64"),
        (lambda: linear_attention_readout(Q, STATE[:1]), RuntimeError, r"state has shape \[1, 2, 16, 7\]"),
        (lambda: linear_attention_readout(Q, STATE[..., :1]), RuntimeError, "2 to 257"),
        (lambda: linear_attention_state(draw(1, 2, 1, 257), draw(1, 2, 1, 3)), RuntimeError, "k has dim 257; support"),
        (lambda: linear_attention_state(draw(1, 2, 1, 3), draw(1, 2, 1, 257)), RuntimeError, "v has dim 257; support"),
        (lambda: torch.ops.vdit_fast.linear_attention_state(K, V, 7, None, None, None), RuntimeError, "map is 7"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
