"""Clustering operators and block means against their references, as operators, and with bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cluster_labels import check_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_fast import ops, reference
from vdit_fast.reference import clusters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same")


def strided(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> Tensor:
    b, n, h, d = shape
    if kind == "heads first":
        return torch.randn(b, h, n, d).to(dtype).transpose(1, 2)
    if kind == "inside a wider tensor":
        return torch.randn(b, n, h, 3 * d + 1).to(dtype)[..., d : 2 * d]
    if kind == "video before text":
        return torch.randn(b, n + 5, h, d).to(dtype)[:, :n]
    if kind == "text before video":
        return torch.randn(b, n + 5, h, d).to(dtype)[:, 5:]
    if kind == "broadcast batch":
        return torch.randn(1, n, h, d).to(dtype).expand(b, -1, -1, -1)
    return torch.randn(shape).to(dtype)


KINDS = ["contiguous", "heads first", "inside a wider tensor", "video before text", "text before video"]
SHAPES = [(2, 203, 3, 64), (1, 1, 1, 1), (1, 97, 2, 33), (2, 13, 1, 128), (1, 101, 2, 256), (3, 6, 2, 7)]


# ---- kmeans_assign


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 17, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest_centroids(shape: tuple[int, int, int, int], classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(len(shape) + classes)
    x = torch.randn(shape).to(dtype)
    centroids = torch.randn(shape[0], shape[2], classes, shape[3])
    check_labels(x, centroids, ops.kmeans_assign(x, centroids))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 210, 3, 70))),
    classes=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_nearest_centroids_of_any_shape(shape, classes, dtype, kind, seed) -> None:
    torch.manual_seed(seed)
    x = strided(shape, kind, dtype)
    centroids = torch.randn(shape[0], shape[2], classes, shape[3])
    labels = ops.kmeans_assign(x, centroids)
    check_labels(x, centroids, labels)
    assert torch.equal(labels, ops.kmeans_assign(x.contiguous(), centroids))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "classes"), [(4, 40), (64, 200), (3, 5)])
def test_equal_distances_take_the_lowest_index(dim: int, classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x = torch.randint(-2, 3, (2, 300, 2, dim)).to(dtype)
    centroids = torch.randint(-2, 3, (2, 2, classes, dim)).float()
    centroids[:, :, classes // 2 :] = centroids[:, :, : classes - classes // 2]  # every centroid twice
    labels = ops.kmeans_assign(x, centroids)
    assert torch.equal(labels, clusters.kmeans_assign(x.double(), centroids))
    assert labels.max() < classes - classes // 2


def test_centroids_are_rounded_to_the_dtype_of_the_tokens() -> None:
    """1 + 2^-10 is 1 in bfloat16, so both centroids are equal there."""
    x = torch.full((1, 3, 1, 2), 2.0)
    centroids = torch.tensor([[1.0, 1.0], [1.0 + 2**-10, 1.0]]).view(1, 1, 2, 2)
    assert ops.kmeans_assign(x.bfloat16(), centroids).tolist() == [[[0, 0, 0]]]
    assert ops.kmeans_assign(x, centroids).tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_of_nan_and_infinity_are_in_range(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, centroids = torch.randn(1, 50, 2, 16).to(dtype), torch.randn(1, 2, 37, 16)
    clean = ops.kmeans_assign(x, centroids)
    x[0, 3, 0, 5], x[0, 7, 1, 0], x[0, 8, 1, 2] = torch.nan, torch.inf, -torch.inf
    labels = ops.kmeans_assign(x, centroids)
    assert (labels >= 0).all() and (labels < 37).all()
    touched = torch.zeros(1, 2, 50, dtype=torch.bool)
    touched[0, 0, 3] = touched[0, 1, 7] = touched[0, 1, 8] = True
    assert torch.equal(labels[~touched], clean[~touched])
    centroids[0, :, 5] = torch.nan
    assert (ops.kmeans_assign(x, centroids)[~touched] != 5).all()


def test_strided_centroids() -> None:
    x, wide = torch.randn(2, 40, 3, 8), torch.randn(2, 9, 3, 20)
    centroids = wide[..., 4:12].transpose(1, 2)
    assert torch.equal(ops.kmeans_assign(x, centroids), ops.kmeans_assign(x, centroids.contiguous()))


# ---- counting_sort


@pytest.mark.parametrize("classes", [1, 2, 37, 1000, 5000])
@pytest.mark.parametrize("tokens", [0, 1, 31, 1009])
def test_sort_is_that_of_the_reference(tokens: int, classes: int) -> None:
    torch.manual_seed(tokens)
    labels = torch.randint(-3, classes + 3, (2, 3, tokens), dtype=torch.int32)
    order, counts = ops.counting_sort(labels, classes)
    want_order, want_counts = clusters.counting_sort(labels, classes)
    assert torch.equal(order, want_order) and torch.equal(counts, want_counts)
    assert order.is_contiguous() and counts.is_contiguous()


def test_sort_of_strided_and_broadcast_labels() -> None:
    labels = torch.randint(0, 9, (2, 50, 3), dtype=torch.int32)
    for view in (labels.transpose(1, 2), labels[:, ::2].transpose(1, 2), labels[:1, :, 0][:, None].expand(4, 5, 50)):
        for got, want in zip(ops.counting_sort(view, 9), ops.counting_sort(view.contiguous(), 9), strict=True):
            assert torch.equal(got, want)


def test_sort_of_extreme_labels() -> None:
    labels = torch.tensor([[[2**31 - 1, -(2**31), 1, 0, 2]]], dtype=torch.int32)
    order, counts = ops.counting_sort(labels, 3)
    assert order.tolist() == [[[1, 3, 2, 0, 4]]] and counts.tolist() == [[[2, 1, 2]]]


# ---- permute_tokens


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.int16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 53, 3, 64), (1, 1, 1, 1), (2, 30, 2, 7)], ids=str)
def test_permutation_is_that_of_the_reference(shape, kind: str, dtype: torch.dtype) -> None:
    b, n, h, _ = shape
    x = (strided(shape, kind, torch.float32) * 100).to(dtype)
    for order_shape in ((1, 1, n), (b, h, n), (1, h, n), (b, 1, n)):
        order = torch.rand(order_shape).argsort(-1).to(torch.int32)
        out = ops.permute_tokens(x, order)
        assert torch.equal(out, clusters.permute_tokens(x, order)) and out.is_contiguous()
        assert torch.equal(ops.permute_tokens(x, order, inverse=True), clusters.permute_tokens(x, order, inverse=True))
        assert torch.equal(ops.permute_tokens(out, order, inverse=True), x)


def test_every_order_of_an_inverse_is_looked_at() -> None:
    """An order that names a token twice leaves another row unwritten."""
    x = torch.randn(2, 200, 3, 4)
    for shape in ((1, 1), (2, 1), (1, 3), (2, 3)):
        order = torch.rand(*shape, 200).argsort(-1).to(torch.int32)
        for view in (order, order.transpose(0, 2).contiguous().transpose(0, 2)):
            assert torch.equal(ops.permute_tokens(ops.permute_tokens(x, view), view, inverse=True), x)
        order[-1, -1, 150] = order[-1, -1, 20]
        with pytest.raises(RuntimeError, match=f"order names token {order[-1, -1, 20]} twice"):
            ops.permute_tokens(x, order, inverse=True)
        assert torch.equal(ops.permute_tokens(x, order), clusters.permute_tokens(x, order))  # a gather


def test_permutation_keeps_nan_bits() -> None:
    x = torch.randint(-(2**15), 2**15, (1, 20, 1, 9)).to(torch.int16).view(torch.float16)
    order = torch.rand(1, 1, 20).argsort(-1).to(torch.int32)
    assert torch.equal(ops.permute_tokens(x, order).view(torch.int16), x.view(torch.int16)[:, order[0, 0].long()])


def test_permutation_is_differentiable() -> None:
    x = torch.randn(2, 11, 3, 4, dtype=torch.float32, requires_grad=True)
    order, weight = torch.rand(2, 3, 11).argsort(-1).to(torch.int32), torch.randn(2, 11, 3, 4)
    for inverse in (False, True):
        got, want = (
            torch.autograd.grad((f(x, order, inverse=inverse) * weight).sum(), x)[0]
            for f in (ops.permute_tokens, clusters.permute_tokens)
        )
        assert torch.equal(got, want)


# ---- block_mean


def check_means(x: Tensor, lengths: Tensor, order: Tensor | None = None, kv_len: Tensor | None = None) -> None:
    means, counts = ops.block_mean(x, lengths, order, kv_len)
    exact, want_counts = reference.block_mean(x.double(), lengths, order, kv_len)
    plain, _ = reference.block_mean(x, lengths, order, kv_len)
    assert torch.equal(counts, want_counts) and counts.dtype == torch.int32 and means.dtype == torch.float32
    assert means.shape == exact.shape and means.is_contiguous()
    assert (means[counts == 0] == 0).all()
    if means.numel():
        allowed = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * x.abs().max()
        assert (means - exact).abs().max() <= allowed


LENGTHS = {
    "one block": [203],
    "patches": [64] * 3 + [11],
    "empty blocks": [0, 5, 0, 0, 100, 0],
    "one long": [1, 1, 170, 0, 1],
    "part borders": [127, 1, 64, 11],
    "no block": [],
    "tokens in none": [3, 128],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_means(lengths: list[int], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(len(lengths))
    b, n, h, _ = shape = (2, 203, 3, 72)
    x = strided(shape, kind, dtype)
    order = torch.rand(b, h, n).argsort(-1).to(torch.int32)
    sizes = torch.tensor(lengths, dtype=torch.int64).view(1, 1, -1)
    check_means(x, sizes)
    check_means(x, sizes.int().expand(b, -1, -1), order[:, :1])
    check_means(x, sizes, order, torch.tensor([50, 203]))
    check_means(x, sizes, order[:1], torch.tensor([0, 500], dtype=torch.int32))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 600, 3, 140))),
    count=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    with_order=st.booleans(),
    with_limit=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_means_of_any_lengths(shape, count, dtype, with_order, with_limit, seed) -> None:
    torch.manual_seed(seed)
    b, n, h, _ = shape
    cuts = torch.randint(0, n + 1, (b, h, count)).sort(-1).values
    lengths = cuts.diff(dim=-1, prepend=torch.zeros(b, h, 1, dtype=torch.int64)).to(torch.int32)
    order = torch.rand(b, h, n).argsort(-1).to(torch.int32) if with_order else None
    limit = torch.randint(0, n + 2, (b,)) if with_limit else None
    check_means(torch.randn(shape).to(dtype), lengths, order, limit)


def test_long_blocks_lose_no_accuracy() -> None:
    """Large equal values: a sum of 40,000 in a row would be off by thousands of units in the last place."""
    x = torch.full((1, 40_000, 1, 3), 1000.1)
    means, _ = ops.block_mean(x, torch.tensor([[[39_000]]]))
    torch.testing.assert_close(means, x[:, :1], rtol=2e-5, atol=0)


def test_left_out_tokens_are_not_read() -> None:
    x = torch.randn(1, 300, 1, 40)
    x[0, 250:] = torch.nan
    order = torch.arange(299, -1, -1, dtype=torch.int32).view(1, 1, -1)
    means, counts = ops.block_mean(x, torch.tensor([[[60, 200, 40]]]), order, torch.tensor([250]))
    assert counts.tolist() == [[[10, 200, 40]]] and means.isfinite().all()
    x[0, 10, 0, 3] = torch.nan
    means, _ = ops.block_mean(x, torch.tensor([[[60, 200, 40]]]), order, torch.tensor([250]))
    assert means.isnan().nonzero().tolist() == [[0, 0, 2, 3]]


# ---- kmeans


def blobs(tokens: int, classes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Tokens around far-apart centres, and which centre."""
    centres = torch.randn(classes, dim) * 20
    member = torch.randint(0, classes, (tokens,))
    return (centres[member] + torch.randn(tokens, dim)).view(1, tokens, 1, dim), member


def test_kmeans_finds_blobs() -> None:
    torch.manual_seed(0)
    x, member = blobs(900, 7, 24)
    seeds = torch.stack([x[0, member == c, 0][0] for c in range(7)]).view(1, 1, 7, 24)
    order, counts, centroids = ops.kmeans(x, seeds, 2)
    assert torch.equal(counts[0, 0].long(), member.bincount(minlength=7))
    assert torch.equal(member[order[0, 0].long()], member.sort().values)
    means = torch.stack([x[0, member == c, 0].mean(0) for c in range(7)])
    torch.testing.assert_close(centroids[0, 0], means)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kmeans_returns_the_means_of_its_clusters(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 333, 3, 16).to(dtype)
    start = torch.randn(2, 3, 20, 16)
    start[:, :, 4] = 1e3  # nobody is near: stays where it is
    order, counts, centroids = ops.kmeans(x, start, 3)
    exact, _ = reference.block_mean(x.double(), counts, order)
    full = counts > 0
    torch.testing.assert_close(centroids[full].double(), exact[full], rtol=1e-5, atol=1e-5)
    assert not full[:, :, 4].any() and (centroids[:, :, 4] == 1e3).all()
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        ops.kmeans(x, start, 0)


def test_more_clusters_than_tokens() -> None:
    x, start = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 40, 8)
    order, counts, centroids = ops.kmeans(x, start, 2)
    assert counts.sum(-1).tolist() == [[3, 3]] and centroids.isfinite().all()
    assert order.sort(-1).values.tolist() == [[[0, 1, 2]] * 2]


# ---- all of them


OPERATORS: dict[str, Callable[[], tuple]] = {
    "kmeans_assign": lambda: (torch.randn(2, 9, 3, 8), torch.randn(2, 3, 5, 8)),
    "counting_sort": lambda: (torch.randint(0, 5, (2, 3, 9), dtype=torch.int32), 5),
    "permute_tokens": lambda: (torch.randn(2, 9, 3, 8), torch.rand(2, 1, 9).argsort(-1).to(torch.int32), True),
    "block_mean": lambda: (
        torch.randn(2, 3, 9, 8).transpose(1, 2), torch.tensor([[[4, 0, 5]]]), None, torch.tensor([3, 9])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.vdit_fast, name), OPERATORS[name]())


def test_opcheck_of_the_gradient() -> None:
    x, order, inverse = OPERATORS["permute_tokens"]()
    torch.library.opcheck(torch.ops.vdit_fast.permute_tokens, (x.requires_grad_(), order, inverse))


def test_no_gradient_passes_through_labels_and_means() -> None:
    x, start = torch.randn(1, 9, 1, 4, requires_grad=True), torch.randn(1, 1, 3, 4, requires_grad=True)
    assert not ops.kmeans_assign(x, start).requires_grad
    assert not any(t.requires_grad for t in ops.block_mean(x, torch.tensor([[[4, 5]]])))
    assert not any(t.requires_grad for t in ops.kmeans(x, start.detach(), 1))


def test_kmeans_compiles_without_a_break() -> None:
    x, start = torch.randn(1, 60, 2, 8), torch.randn(1, 2, 6, 8)
    compiled = torch.compile(ops.kmeans, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, start, 2), ops.kmeans(x, start, 2), strict=True):
        assert torch.equal(got, want)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(3)
    x, start = torch.randn(2, 1500, 2, 40), torch.randn(2, 2, 30, 40)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.kmeans(x, start, 2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)], ids=str)
def test_empty_tensors(shape: tuple[int, int, int, int]) -> None:
    b, n, h, d = shape
    x, order = torch.randn(shape), torch.arange(n, dtype=torch.int32).view(1, 1, n)
    assert ops.kmeans_assign(x, torch.randn(b, h, 3, d)).shape == (b, h, n)
    assert ops.permute_tokens(x, order).shape == shape
    means, counts = ops.block_mean(x, torch.zeros(1, 1, 2, dtype=torch.int32), order)
    assert means.shape == (b, h, 2, d) and not means.any() and not counts.any()
    assert ops.permute_tokens(torch.randn(2, 4, 3, 0), torch.arange(4, dtype=torch.int32).view(1, 1, 4)).numel() == 0


X, CENTROIDS = torch.randn(2, 5, 3, 8), torch.randn(2, 3, 4, 8)
ORDER, LENGTH = torch.arange(5, dtype=torch.int32).view(1, 1, 5), torch.tensor([[[2, 3]]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.kmeans_assign(X[0], CENTROIDS), r"x has shape \[5, 3, 8\]; expected \[batch, tokens, heads"),
        (lambda: ops.kmeans_assign(X.double(), CENTROIDS), "x is float64; convert it to float32"),
        (lambda: ops.kmeans_assign(X.mT.contiguous().mT, CENTROIDS), "stride 3 in its last dimension"),
        (lambda: ops.kmeans_assign(X, CENTROIDS.half()), "centroids is float16; centroids are float32"),
        (lambda: ops.kmeans_assign(X, CENTROIDS[:1]), r"centroids has shape \[1, 3, 4, 8\]; .*\[2, 3, C, 8\]"),
        (lambda: ops.kmeans_assign(X, CENTROIDS[:, :, :0]), r"expected \[batch, heads, at least 1, dim\]"),
        (lambda: ops.kmeans_assign(torch.randn(1, 2, 1, 300), CENTROIDS), "x has dim 300; expected 1 to 256"),
        (lambda: ops.kmeans_assign(X, CENTROIDS.mT.contiguous().mT), "centroids has stride 4"),
        (lambda: ops.counting_sort(ORDER.long(), 5), "labels is int64; expected int32"),
        (lambda: ops.counting_sort(ORDER[0], 5), r"labels has shape \[1, 5\]; expected \[batch, heads, tokens\]"),
        (lambda: ops.counting_sort(ORDER, 0), "classes is 0; expected at least 1"),
        (lambda: ops.permute_tokens(X.double(), ORDER), "x is float64 of 8 bytes; expected a dtype of 2 or 4 bytes"),
        (lambda: ops.permute_tokens(X, ORDER[..., :4]), r"order has shape \[1, 1, 4\]; expected \[1 or 2, 1 or 3, 5\]"),
        (lambda: ops.permute_tokens(X, ORDER.long()), "order is int64; expected int32"),
        (lambda: ops.permute_tokens(X, ORDER + 1), "order has entries outside 0 to 4"),
        (lambda: ops.permute_tokens(X, ORDER + 1, inverse=True), "order has entries outside 0 to 4"),
        (lambda: ops.permute_tokens(X, ORDER.clamp(max=3), inverse=True), "order names token 3 twice; its inverse"),
        (lambda: ops.block_mean(X, LENGTH.float()), "lengths is float32; expected int32 or int64"),
        (lambda: ops.block_mean(X, LENGTH[0]), r"lengths has shape \[1, 2\]; expected \[1 or 2, 1 or 3, any\]"),
        (lambda: ops.block_mean(X, LENGTH + 1), r"lengths\[0, 0, 1\] is 4; lengths are at least 0 and sum to at most"),
        (lambda: ops.block_mean(X, LENGTH - 3), r"lengths\[0, 0, 0\] is -1"),
        (lambda: ops.block_mean(X, LENGTH, ORDER - 1), "order has entries outside 0 to 4"),
        (lambda: ops.block_mean(X, LENGTH, ORDER[0]), r"order has shape \[1, 5\]"),
        (lambda: ops.block_mean(X, LENGTH, None, torch.tensor([5])), r"kv_len has shape \[1\]; expected \[batch\]"),
        (lambda: ops.block_mean(X, LENGTH, None, torch.tensor([5.0, 5.0])), "kv_len is float32"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- on a GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("shape", "classes"), [((2, 6144, 3, 128), 1000), ((1, 203, 2, 64), 17), ((1, 97, 1, 200), 1)])
def test_cuda_kmeans(shape: tuple[int, int, int, int], classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    start = torch.randn(shape[0], shape[2], classes, shape[3])
    check_labels(x, start, ops.kmeans_assign(x.cuda(), start.cuda()).cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        order, counts, centroids = ops.kmeans(x.cuda(non_blocking=True), start.cuda(non_blocking=True), 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact, want = reference.block_mean(x.double(), counts.cpu(), order.cpu())
    full = want > 0
    assert torch.equal(counts.cpu(), want) and counts.sum() == shape[0] * shape[1] * shape[2]
    torch.testing.assert_close(centroids.cpu()[full].double(), exact[full], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("tokens", [1, 2048, 75_600])
@pytest.mark.parametrize("classes", [1, 1000, 5000])
def test_cuda_sort_and_permutation(tokens: int, classes: int) -> None:
    labels = torch.randint(-3, classes + 3, (2, 3, tokens), dtype=torch.int32)
    order, counts = ops.counting_sort(labels.cuda(), classes)
    for got, want in zip((order, counts), clusters.counting_sort(labels, classes), strict=True):
        assert torch.equal(got.cpu(), want)
    for x in (
        torch.randn(2, tokens, 3, 64).bfloat16(),
        torch.randn(2, tokens, 3, 7),
        torch.randn(2, tokens, 3, 5).half(),
    ):
        there = ops.permute_tokens(x.cuda(), order)
        assert torch.equal(there.cpu(), clusters.permute_tokens(x, order.cpu()))
        assert torch.equal(ops.permute_tokens(there, order, inverse=True).cpu(), x)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[128] * 48, [75] * 80, [6000, 0, 1, 143]], ids=["patches", "clusters", "unequal"])
def test_cuda_means(lengths: list[int], dtype: torch.dtype) -> None:
    x, sizes = torch.randn(2, 6144, 2, 128).to(dtype), torch.tensor([[lengths]])
    order, limit = torch.rand(2, 2, 6144).argsort(-1).to(torch.int32), torch.tensor([6144, 5000])
    first = ops.block_mean(x.cuda(), sizes.cuda(), order.cuda(), limit.cuda())
    again = ops.block_mean(x.cuda(), sizes.cuda(), order.cuda(), limit.cuda())
    exact, counts = reference.block_mean(x.double(), sizes, order, limit)
    assert torch.equal(first[1].cpu(), counts) and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[0].cpu().double(), exact, rtol=1e-5, atol=1e-5)
