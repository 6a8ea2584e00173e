"""select_top_k and select_top_p: equal to the reference bit for bit, as operators, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_rows import KINDS, draw
from torch import Tensor

from vdit_fast.ops import select_top_k, select_top_p
from vdit_fast.reference import select as reference

OPS = torch.ops.vdit_fast
SIZES = (1, 2, 23, 24, 25, 31, 32, 33, 97, 630, 1021, 5003)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_top_k_equals_the_reference(kind: str, n: int) -> None:
    scores = draw(kind, 5, n, seed=n)
    for k in sorted({-1, 0, 1, 2, n // 3, n - 1, n, n + 5, 2**40}):
        assert torch.equal(select_top_k(scores, k), reference.select_top_k(scores, k)), k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_top_p_equals_the_reference(kind: str, n: int) -> None:
    mass = draw(kind, 5, n, seed=n)
    for p in (0, 0.1, 0.5, 0.9, 0.999, 1):
        for least in (-1, 1, 3, n // 2, n + 1):
            assert torch.equal(select_top_p(mass, p, least), reference.select_top_p(mass, p, least)), (p, least)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    n=st.integers(1, 400),
    kind=st.sampled_from(KINDS),
    p=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_row(rows: int, n: int, kind: str, p: float, seed: int) -> None:
    x = draw(kind, rows, n, seed)
    k = torch.randint(-1, n + 2, (rows,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(select_top_k(x, k), reference.select_top_k(x, k))
    assert torch.equal(select_top_p(x, p), reference.select_top_p(x, p))


def test_a_row_of_a_million() -> None:
    scores = torch.randn(1, 1_000_003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(select_top_k(scores, 250_001), reference.select_top_k(scores, 250_001))
    weights = scores.softmax(-1)
    assert torch.equal(select_top_p(weights, 0.9), reference.select_top_p(weights, 0.9))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_counts_broadcast(dtype: torch.dtype) -> None:
    scores = draw("ties", 24, 50).view(2, 3, 4, 50)
    for shape in ((2, 3, 4), (3, 1), (4,), (1,), ()):
        k = torch.randint(0, 52, shape).to(dtype)
        assert torch.equal(select_top_k(scores, k), reference.select_top_k(scores, k)), shape


def test_strides() -> None:
    base = draw("wild", 60, 44).view(3, 20, 44)
    views = [base.transpose(0, 1), base[:, ::3], base.transpose(1, 2), base[1].expand(5, 20, 44), base[..., 3:9]]
    for x in views:
        got, want = select_top_k(x, 4), reference.select_top_k(x, 4)
        assert torch.equal(got, want) and got.shape == x.shape and got.is_contiguous()
        assert torch.equal(select_top_p(x, 0.6), reference.select_top_p(x, 0.6))


def test_rules_of_the_contract() -> None:
    nan, inf = torch.nan, torch.inf
    assert select_top_k(torch.tensor([0.0, -0.0, 0.0, -1.0]), 2).tolist() == [True, True, False, False]
    assert select_top_k(torch.tensor([inf, nan, 3.0, -nan]), 2).tolist() == [False, True, False, True]
    assert select_top_k(torch.tensor([-inf, -inf]), 0).tolist() == [True, False]
    # up to and including the entry at which the sum exceeds p
    quarter = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert select_top_p(quarter, 0.5).tolist() == [True, True, True, False]
    assert select_top_p(quarter, 0.49).tolist() == [True, True, False, False]
    assert select_top_p(quarter, 0.0).tolist() == [True, False, False, False]
    assert select_top_p(torch.tensor([nan, 1.0, nan, 0.0]), 0.0).tolist() == [True, True, True, False]
    assert select_top_p(torch.tensor([300.0, 256.0, 1.0]), 0.5).tolist() == [True, True, False]  # both count 256
    # a row without a unit of mass keeps everything, and so does p = 1: no sum exceeds the row's
    assert select_top_p(torch.tensor([2.0**-33, 0.0, -1.0]), 0.0).tolist() == [True, True, True]
    assert select_top_p(torch.tensor([0.0, 0.5, -1.0, 0.5]), 1.0).tolist() == [True, True, True, True]
    assert select_top_p(torch.tensor([0.0, 0.5, -1.0, 0.5]), 0.999).tolist() == [False, True, False, True]


def test_bitwise_equal_for_any_number_of_threads() -> None:
    mass, threads = draw("softmax", 400, 333), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(select_top_p(mass, 0.7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_empty_batches() -> None:
    assert select_top_k(torch.randn(0, 3, 5), 2).shape == (0, 3, 5)
    assert select_top_p(torch.randn(2, 0, 5), 0.5).shape == (2, 0, 5)


def test_opcheck() -> None:
    x = draw("softmax", 6, 20).view(2, 3, 20)
    for scores in (x, x.transpose(0, 1), x.requires_grad_()):
        rows = scores.shape[:-1]
        torch.library.opcheck(OPS.select_top_k, (scores, None, 4))
        torch.library.opcheck(OPS.select_top_k, (scores, torch.full(rows, 3), 1))
        torch.library.opcheck(OPS.select_top_p, (scores, 0.5, 2))


def test_not_differentiable() -> None:
    x = torch.rand(3, 9).requires_grad_()
    for keep in (select_top_k(x, 2), select_top_p(x, 0.5)):
        assert keep.dtype == torch.bool and not keep.requires_grad
    (x * select_top_k(x, 2)).sum().backward()
    assert torch.equal(x.grad, select_top_k(x, 2).float())


def test_compiles_as_one_graph() -> None:
    def both(x: Tensor, k: Tensor) -> Tensor:
        return select_top_k(x, k) & select_top_p(x, 0.9, 2)

    x, k = draw("softmax", 4, 30), torch.tensor([1, 2, 3, 40])
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x, k), both(x, k))


X = torch.rand(2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_top_k(X.half(), 1), "scores is float16; convert it to float32"),
        (
            lambda: select_top_k(torch.tensor(1.0), 1),
            r"scores has shape \[\]; expected \[\.\.\., n\] with n at least 1",
        ),
        (lambda: select_top_k(X[:, :0], 1), r"scores has shape \[2, 0\]"),
        (lambda: select_top_k(X, torch.tensor([1.0, 2.0])), "k is float32; expected int32 or int64"),
        (lambda: OPS.select_top_k(X, torch.tensor([1, 2, 3]), 1), r"k has shape \[3\] but scores have \[2, 5\]"),
        (lambda: select_top_p(X.double(), 0.5), "mass is float64"),
        (lambda: select_top_p(X, 1.5), r"p is 1.5; expected a share in \[0, 1\]"),
        (lambda: select_top_p(X, -0.1), "p is -0.1"),
        (lambda: select_top_p(X, float("nan")), "p is nan"),
        (lambda: select_top_p(X[:1, :1].expand(1, 2**23), 0.5), "rows of 8388608 entries; at most 8388607"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_the_reference(kind: str) -> None:
    for n in (1, 33, 630, 4096, 4097, 100_003):
        x = draw(kind, 9, n, seed=n)
        k = torch.randint(0, n + 2, (9,))
        got = select_top_k(x.cuda(), k.cuda())
        assert torch.equal(got.cpu(), reference.select_top_k(x, k)), n
        assert torch.equal(select_top_p(x.cuda(), 0.8, 2).cpu(), reference.select_top_p(x, 0.8, 2)), n
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again = select_top_k(x.cuda(), k.cuda())
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(again, got)
