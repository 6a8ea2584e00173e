"""Clustering operators and block means by the CUDA kernels of csrc/kernels/select, emulated."""

from __future__ import annotations

import pytest
import torch
from cluster_labels import check_labels
from emulator_clusters import block_mean, counting_sort, kmeans_assign, permute_tokens
from torch import Tensor

from emulator import EAGER_SKEW, LAZY_FORWARD, LAZY_REVERSE, RANDOMS, EmulatorError
from vdit_fast import reference
from vdit_fast.reference import clusters

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FOUR = (LAZY_FORWARD, LAZY_REVERSE, EAGER_SKEW, RANDOMS[0])


def strided(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str) -> Tensor:
    b, n, h, d = shape
    if kind == "heads first":
        return torch.randn(b, h, n, d).to(dtype).transpose(1, 2)
    if kind == "odd rows":  # the first is aligned to 16 bytes, others are not
        return torch.randn(b, n, h, d + 3).to(dtype)[..., :d]
    if kind == "odd start":
        return torch.randn(b, n, h, d + 8).to(dtype)[..., 1 : 1 + d]
    if kind == "text first":
        return torch.randn(b, n + 5, h, d).to(dtype)[:, 5:]
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(("shape", "classes", "dtype", "kind"), [
    ((1, 300, 2, 64), 200, BF16, "contiguous"),
    ((2, 129, 1, 64), 65, F16, "heads first"),
    ((1, 140, 2, 128), 300, F16, "text first"),
    ((1, 31, 1, 128), 64, BF16, "odd rows"),
    ((1, 65, 1, 256), 130, BF16, "contiguous"),
    ((1, 70, 2, 200), 20, F16, "heads first"),
    ((1, 37, 1, 33), 97, BF16, "contiguous"),
    ((2, 1, 3, 1), 1, F16, "contiguous"),
    ((1, 3, 2, 16), 129, BF16, "odd start"),
], ids=str)  # fmt: skip
def test_nearest_centroids(shape: tuple[int, int, int, int], classes: int, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(classes)
    x, centroids = strided(shape, dtype, kind), torch.randn(shape[0], shape[2], classes, shape[3])
    first = None
    for policy in FOUR:
        labels = kmeans_assign(x, centroids, policy)
        check_labels(x, centroids, labels)
        assert first is None or torch.equal(labels, first), f"{policy}: labels differ from the first policy's"
        first = labels


@pytest.mark.parametrize(("dim", "classes"), [(4, 40), (64, 200), (160, 70)])
def test_equal_distances_take_the_lowest_index(dim: int, classes: int) -> None:
    torch.manual_seed(dim)
    x = torch.randint(-2, 3, (1, 200, 2, dim)).to(F16)
    centroids = torch.randint(-2, 3, (1, 2, classes, dim)).float()
    centroids[:, :, classes // 2 :] = centroids[:, :, : classes - classes // 2]  # every centroid twice
    wide = torch.cat([centroids, centroids], 3)[..., :dim]
    for policy in (LAZY_FORWARD, RANDOMS[1]):
        assert torch.equal(kmeans_assign(x, wide, policy), clusters.kmeans_assign(x.double(), centroids))


def test_centroids_are_rounded_to_the_dtype_of_the_tokens() -> None:
    """1 + 2^-10 is 1 in bfloat16, so both centroids are equal there, norms included."""
    centroids = torch.tensor([[1.0 + 2**-10, 1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    assert kmeans_assign(torch.full((1, 3, 1, 2), 2.0).bfloat16(), centroids).tolist() == [[[0, 0, 0]]]
    assert kmeans_assign(torch.full((1, 3, 1, 2), 0.5).bfloat16(), centroids).tolist() == [[[0, 0, 0]]]


def test_labels_of_nan_and_infinity_are_in_range() -> None:
    torch.manual_seed(0)
    x, centroids = torch.randn(1, 50, 1, 64).bfloat16(), torch.randn(1, 1, 37, 64)
    clean = kmeans_assign(x, centroids)
    x[0, 3, 0, 5], x[0, 7, 0, 0] = torch.nan, torch.inf
    centroids[0, 0, 5] = torch.nan
    labels = kmeans_assign(x, centroids)
    assert (labels >= 0).all() and (labels < 37).all() and (labels[0, 0, 8:] != 5).all()
    same = (clean != 5) & (torch.arange(50) != 3) & (torch.arange(50) != 7)
    assert torch.equal(labels[same], clean[same])
    assert not kmeans_assign(x, centroids[:, :, 5:6]).any()


def test_float32_tokens_are_refused() -> None:
    with pytest.raises(EmulatorError, match="error code 1"):
        kmeans_assign(torch.randn(1, 3, 1, 8), torch.randn(1, 1, 2, 8))


@pytest.mark.parametrize(("tokens", "classes"), [
    (5000, 37), (2048, 1000), (2049, 1), (4100, 2500), (1, 1), (31, 5), (0, 3), (257, 1025),
])  # fmt: skip
def test_sort(tokens: int, classes: int) -> None:
    torch.manual_seed(tokens)
    labels = torch.randint(-3, classes + 3, (1, 2, tokens), dtype=torch.int32)
    want = clusters.counting_sort(labels, classes)
    for policy in FOUR:
        for got, right in zip(counting_sort(labels, classes, policy), want, strict=True):
            assert torch.equal(got, right), str(policy)


def test_sort_of_strided_labels() -> None:
    labels = torch.randint(0, 9, (2, 300, 3), dtype=torch.int32)
    for view in (labels.transpose(1, 2), labels[:, ::2].transpose(1, 2), labels[:1, :, 0][:, None].expand(2, 3, 300)):
        for got, want in zip(counting_sort(view, 9), clusters.counting_sort(view, 9), strict=True):
            assert torch.equal(got, want)
    extreme = torch.tensor([[[2**31 - 1, -(2**31), 1, 0, 2]]], dtype=torch.int32)
    assert counting_sort(extreme, 3)[0].tolist() == [[[1, 3, 2, 0, 4]]]


@pytest.mark.parametrize(("shape", "dtype", "kind"), [
    ((2, 150, 3, 64), BF16, "contiguous"),
    ((1, 67, 2, 8), F32, "heads first"),
    ((1, 70, 2, 7), F16, "contiguous"),
    ((2, 65, 1, 6), F16, "contiguous"),
    ((1, 64, 2, 128), BF16, "text first"),
    ((1, 129, 1, 24), F32, "odd rows"),
    ((1, 20, 2, 24), F16, "odd start"),
    ((1, 1, 1, 1), torch.int16, "contiguous"),
], ids=str)  # fmt: skip
def test_permutation(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str) -> None:
    b, n, h, _ = shape
    x = strided(shape, dtype, kind)
    for order_shape in ((b, h, n), (1, h, n), (1, 1, n)):
        order = torch.rand(order_shape).argsort(-1).to(torch.int32)
        for policy in FOUR:
            for inverse in (False, True):
                got = permute_tokens(x, order, inverse=inverse, policy=policy)
                assert torch.equal(got, clusters.permute_tokens(x, order, inverse=inverse)), str(policy)


def check_means(
    x: Tensor, lengths: Tensor, order: Tensor | None = None, kv_len: Tensor | None = None, policies=FOUR
) -> None:
    exact, want = reference.block_mean(x.double(), lengths, order, kv_len)
    plain, _ = reference.block_mean(x, lengths, order, kv_len)
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(F32).eps * x.abs().max()
    first = None
    for policy in policies:
        means, counts = block_mean(x, lengths, order, kv_len, policy)
        assert torch.equal(counts, want), str(policy)
        assert (means - exact).abs().max() <= allowed, str(policy)
        assert first is None or torch.equal(means, first), f"{policy}: bits differ from the first policy's"
        first = means


LENGTHS = {
    "patches": [64] * 9 + [24],
    "regular": [128] * 4 + [88],
    "empty": [0, 5, 0, 0, 100, 0],
    "one long": [1, 1, 570, 0, 1],
    "part borders": [129, 127, 128, 1, 200],
    "tokens in none": [3, 300],
}


@pytest.mark.parametrize(("dtype", "dim", "kind"), [
    (BF16, 128, "contiguous"), (F16, 64, "text first"), (F32, 64, "heads first"), (BF16, 33, "contiguous"),
    (F32, 260, "contiguous"), (F16, 8, "odd rows"), (F32, 7, "odd start"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_means(lengths: list[int], dtype: torch.dtype, dim: int, kind: str) -> None:
    torch.manual_seed(len(lengths))
    x, sizes = strided((2, 600, 2, dim), dtype, kind), torch.tensor([[lengths]])
    order = torch.rand(2, 2, 600).argsort(-1).to(torch.int32)
    check_means(x, sizes, policies=FOUR[:1])
    check_means(x, sizes.int(), order, torch.tensor([600, 301]))
    check_means(x, sizes.expand(2, 1, -1), order[:1], torch.tensor([0, 700], dtype=torch.int32), policies=FOUR[3:])


def test_more_blocks_than_threads_look_at_once() -> None:
    x = torch.randn(1, 700, 1, 24).bfloat16()
    check_means(x, torch.tensor([[[1] * 500 + [0] * 30 + [150] + [2] * 10]]), policies=(LAZY_REVERSE, RANDOMS[2]))


def test_means_of_different_lengths() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 700, 2, 40).bfloat16()
    cuts = torch.randint(0, 701, (2, 2, 9)).sort(-1).values
    lengths = cuts.diff(dim=-1, prepend=torch.zeros(2, 2, 1, dtype=torch.int64)).to(torch.int32)
    check_means(x, lengths, torch.rand(2, 1, 700).argsort(-1).to(torch.int32))
    check_means(x, lengths[:, :1])
    check_means(x, lengths[:1].transpose(1, 2).contiguous().transpose(1, 2))


def test_left_out_tokens_are_not_read() -> None:
    x = torch.randn(1, 300, 1, 40)
    x[0, 250:] = torch.nan
    order = torch.arange(299, -1, -1, dtype=torch.int32).view(1, 1, -1)
    means, counts = block_mean(x, torch.tensor([[[60, 200, 40]]]), order, torch.tensor([250]))
    assert counts.tolist() == [[[10, 200, 40]]] and means.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_input_stays_inside_the_tensors(seed: int) -> None:
    """Wrong numbers may come out, but every access is inside: the buffers end at unmapped pages."""
    g = torch.Generator().manual_seed(seed)
    wild = torch.tensor([-(2**31), -5, -1, 0, 3, 299, 300, 1000, 2**30, 2**31 - 1])

    def damage(t: Tensor) -> Tensor:
        at = torch.rand(t.shape, generator=g) < 0.3
        return torch.where(at, wild[torch.randint(0, len(wild), t.shape, generator=g)].to(t.dtype), t).contiguous()

    x, order = torch.randn(2, 300, 2, 24).half(), torch.rand(2, 2, 300).argsort(-1).to(torch.int32)
    lengths = torch.full((2, 2, 10), 30, dtype=(torch.int32, torch.int64)[seed % 2])
    means, counts = block_mean(x, damage(lengths), damage(order), torch.tensor([-(2**40), 2**40]), RANDOMS[seed % 3])
    assert means.isfinite().all() and (counts >= 0).all() and (counts[0] == 0).all()
    for inverse in (False, True):
        permute_tokens(x, damage(order), inverse=inverse, policy=RANDOMS[seed % 3])


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)], ids=str)
def test_empty_tensors(shape: tuple[int, int, int, int]) -> None:
    b, n, h, d = shape
    x, order = torch.randn(shape).half(), torch.arange(n, dtype=torch.int32).view(1, 1, n).expand(b, h, n)
    assert kmeans_assign(x, torch.randn(b, h, 3, d)).shape == (b, h, n)
    permute_tokens(x, order)
    means, counts = block_mean(x, torch.zeros(1, 1, 2, dtype=torch.int32))
    assert not means.any() and not counts.any()
