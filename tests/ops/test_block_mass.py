"""score_lse and block_mass on the CPU: closed forms, fp64 over shapes, strides and options, bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_inputs import BAD, BLOCKS, DTYPES, LENGTHS, STRIDES, strided, tensors, worst
from torch import Tensor

import vdit_fast
from vdit_fast import reference
from vdit_fast.ops import block_mass, score_lse


def torch_path(q: Tensor, k: Tensor, lse: Tensor, q_block: int, kv_block: int, fold: int, scale: float) -> Tensor:
    """What one would write in torch in the dtype of q; no kv_len."""
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % fold)).unflatten(1, (-1, fold)) for x in (q, k))
    k = k.repeat_interleave(q.shape[3] // k.shape[3], 3)
    scores = torch.einsum("bifhd,bjfhd->bhij", q.flip(2), k) * scale
    weight = (scores.float() - lse[..., None]).exp()
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[3] % kv_block, 0, -weight.shape[2] % q_block))
    return weight.unflatten(3, (-1, kv_block)).sum(-1).unflatten(2, (-1, q_block)).sum(3)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    lq=st.sampled_from(LENGTHS),
    lk=st.sampled_from(LENGTHS),
    dim=st.sampled_from([1, 20, 40, 64, 72, 128, 256]),
    fold=st.sampled_from([1, 1, 2, 3, 8, 16]),
    blocks=st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)),
    stride=st.sampled_from(STRIDES),
    options=st.sets(st.sampled_from(["kv_len", "scale", "stale", "dead"])),
    seed=st.integers(0, 2**16),
)
def test_against_fp64(dtype, batch, heads, lq, lk, dim, fold, blocks, stride, options, seed):
    q, k = tensors(lq, lk, batch, *heads, dim, dtype, seed)
    g = torch.Generator().manual_seed(seed + 1)
    scale = -0.07 if "scale" in options else dim**-0.5 / fold
    kv_len = torch.randint(0, lk + 1, (batch,), generator=g) if "kv_len" in options else None
    call = {"scale": scale, "fold": fold, "kv_len": kv_len}
    q_in, k_in = strided(q, stride), strided(k, stride)

    lse = score_lse(q_in, k_in, **call)
    want = reference.score_lse(q.double(), k.double(), **call)
    base = reference.score_lse(q.float(), k.float(), **call)
    assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == want.shape
    assert torch.equal(lse == -torch.inf, want == -torch.inf)
    finite = want.isfinite()
    limit = 2 * worst(base[finite], want[finite]) + 4e-7 * float(want[finite].abs().max() if finite.any() else 0)
    assert worst(lse[finite], want[finite]) <= limit

    given_lse = want.float()
    if "stale" in options:
        given_lse = given_lse + torch.randn(want.shape, generator=g)
    if "dead" in options:
        given_lse[torch.rand(want.shape, generator=g) < 0.3] = -torch.inf
    mass = block_mass(q_in, k_in, given_lse, *blocks, **call)
    want = reference.block_mass(q.double(), k.double(), given_lse, *blocks, **call)
    base = reference.block_mass(q.float(), k.float(), given_lse, *blocks, **call)
    assert mass.dtype == torch.float32 and mass.is_contiguous() and mass.shape == want.shape
    assert worst(mass, want) <= 2 * worst(base, want) + 1e-6 * float(want.max())
    assert not mass[want == 0].any()  # no key, or no row that counts: exactly 0
    if kv_len is None and "dead" not in options and dtype != torch.float32:
        same = torch_path(q, k, given_lse, *blocks, fold, scale)
        assert worst(mass, want) <= 2 * worst(same, want) + 1e-6 * float(want.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, 311])
def test_rows_sum_to_their_queries(dtype: torch.dtype, block: int, tokens: int) -> None:
    """Sheet 4(g)1: with the exact LSE every row of W sums to its number of valid rows."""
    q, k = tensors(tokens, 337, dim=64, dtype=dtype)
    kv_len = torch.tensor([337, 101])
    mass = block_mass(q, k, score_lse(q, k, kv_len=kv_len), block, block, kv_len=kv_len)
    rows = torch.full((-(-tokens // block),), float(block))
    rows[-1] = tokens - block * (len(rows) - 1)
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, 4, -1), rtol=1e-5, atol=0)
    assert not mass[1, :, :, -(-101 // block) :].any()


@pytest.mark.parametrize(("q_block", "kv_block"), [(64, 64), (128, 128), (64, 37), (5, 64)])
def test_is_the_block_sum_of_the_softmax(q_block: int, kv_block: int) -> None:
    """Sheet 4(g)1 and 6.5: with fold 1 the exact block mass."""
    q, k = tensors(200, 170, kv_heads=4)
    lse = vdit_fast.attention(q, k, k, return_lse=True)[1]
    weights = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 32**-0.5).softmax(-1)
    mass = block_mass(q, k, lse, q_block, kv_block)
    for i, j in ((0, 0), (0, 1), (mass.shape[2] - 1, mass.shape[3] - 1), (1, mass.shape[3] - 1)):
        part = weights[:, :, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
        torch.testing.assert_close(mass[:, :, i, j].double(), part.sum((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score_lse(q, k), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 8, 16])
def test_antidiagonals(stride: int) -> None:
    """A9: a folded score is the sum along the antidiagonal of a stride x stride block of QK^T."""
    q, k = tensors(96, 144, kv_heads=4)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double())
    tiles = scores.unflatten(3, (-1, stride)).unflatten(2, (-1, stride)).transpose(3, 4)  # [B, H, I, J, s, s]
    anti = tiles.flip(-1).diagonal(dim1=-2, dim2=-1).sum(-1) * (32**-0.5 / stride)
    lse = score_lse(q, k, fold=stride)
    torch.testing.assert_close(lse.double(), anti.logsumexp(-1), rtol=1e-6, atol=1e-6)
    mass = block_mass(q, k, lse, 1, 1, fold=stride)  # blocks of one: the weights themselves
    torch.testing.assert_close(mass.double(), anti.softmax(-1), rtol=2e-5, atol=1e-6)


def test_block_diagonal_attention_keeps_its_mass() -> None:
    """Sheet 4(g)5."""
    q = torch.nn.functional.one_hot(torch.arange(320) // 64, 32).float().view(1, 320, 1, 32) * 10
    mass = block_mass(q, q, score_lse(q, q), 64, 64)
    torch.testing.assert_close(mass[0, 0], 64 * torch.eye(5), rtol=1e-5, atol=1e-4)


def test_repeated_calls_and_thread_counts_give_the_same_bits() -> None:
    """Sheet 4(g)4: a cached LSE with unchanged q and k gives the same ranking."""
    q, k = tensors(700, 900, dim=64)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            lse = score_lse(q, k)
            results.append((lse, block_mass(q, k, lse, 64, 64), block_mass(q, k, lse, 128, 100)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_more_packed_keys_than_fit_at_once() -> None:
    q, k = tensors(3, 70_000, 1, 2, 1, 256)  # 72 MB of keys
    lse, many = score_lse(q, k), [x.expand(3, -1, -1, -1) for x in (q, k)]
    mass = block_mass(q, k, lse, 64, 64)
    assert torch.equal(score_lse(*many), lse.expand(3, -1, -1))
    assert torch.equal(block_mass(*many, lse.expand(3, -1, -1), 64, 64), mass.expand(3, -1, -1, -1))


def test_what_is_not_read_may_hold_anything() -> None:
    q, k = tensors()
    kv_len = torch.tensor([100, 0])
    lse = score_lse(q, k, kv_len=kv_len, fold=3)
    lse[:, :, ::4] = -torch.inf
    clean = block_mass(q, k, lse, 4, 5, kv_len=kv_len, fold=3)
    k[0, 100:] = torch.nan
    k[1] = torch.inf
    for i in range(0, lse.shape[2], 4):
        q[:, 3 * i : 3 * i + 3] = torch.nan
    assert torch.equal(block_mass(q, k, lse, 4, 5, kv_len=kv_len, fold=3), clean)
    assert (score_lse(q, k, kv_len=kv_len)[1] == -torch.inf).all()
    assert clean[0].any() and not clean[1].any()


def test_nan_stays_in_its_block() -> None:
    q, k = tensors(kv_heads=4)
    lse = score_lse(q, k)
    clean = block_mass(q, k, lse, 32, 32)
    k[0, 40, 1] = torch.nan
    mass = block_mass(q, k, lse, 32, 32)
    hit = torch.zeros_like(mass, dtype=torch.bool)
    hit[0, 1, :, 1] = True
    assert mass[hit].isnan().all() and torch.equal(mass[~hit], clean[~hit])
    q[1, 70, 2] = torch.nan
    lse = score_lse(q, k)
    assert lse[1, 2, 70].isnan() and lse[0, 1].isnan().all() and int(lse.isnan().sum()) == 131


@pytest.mark.parametrize("shift", [-30.0, -100.0, 80.0, torch.inf])
def test_partial_and_absurd_lse(shift: float) -> None:
    """A partial LSE only scales whole rows; beyond fp32 the weights are inf or 0, as exp has it."""
    q, k = tensors(90, 90, heads=2)
    lse = score_lse(q, k)
    got = block_mass(q, k, lse + shift, 1, 32)
    want = reference.block_mass(q.double(), k.double(), lse + shift, 1, 32).float()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-37)
    assert got.isinf().any() == (shift == -100.0)


@pytest.mark.parametrize("length", [2**20 + 1])
def test_one_long_row_in_one_block(length: int) -> None:
    """Sums of a million weights lose nothing."""
    q, k = tensors(2, length, 1, 1, 1, 8)
    mass = block_mass(q, k, score_lse(q, k), 2, length)
    torch.testing.assert_close(mass, torch.full((1, 1, 1, 1), 2.0), rtol=1e-6, atol=0)


def test_large_blocks_of_queries() -> None:
    q, k = tensors(500, 130)
    lse = score_lse(q, k)
    whole, parts = block_mass(q, k, lse, 500, 64), block_mass(q, k, lse, 100, 64)
    torch.testing.assert_close(whole[:, :, 0], parts.sum(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fold", [1, 3])
def test_blocks_larger_than_everything(fold: int) -> None:
    q, k = tensors(50, 70)
    lse, most = score_lse(q, k, fold=fold), 2**63 - 1
    for blocks in ((most, most), (7, most), (most, 7)):
        mass = block_mass(q, k, lse, *blocks, fold=fold)
        assert torch.equal(mass, block_mass(q, k, lse, *(min(n, 70) for n in blocks), fold=fold)) and mass.any()
    assert block_mass(q[:, :0], k, lse[..., :0], most, most, fold=fold).shape == (2, 4, 0, 1)
    assert block_mass(q, k[:, :0], lse, most, most, fold=fold).shape == (2, 4, 1, 0)


@pytest.mark.parametrize("key", [0, 40, 70, 149])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_scores(dtype: torch.dtype, key: int) -> None:
    """A score of +inf makes its row's LSE +inf; NaN wins. In panels and stages before, at and behind others."""
    q, k = tensors(dtype=dtype, kv_heads=4)
    k[0, key, 1, 3] = torch.inf  # scores of both signs
    k[1, key, 2, 3] = k[1, 100, 2, 3] = torch.inf
    q[1, 5, 2, 4], q[0, 7, 1, 3] = torch.nan, 0.0
    lse, want = score_lse(q, k), reference.score_lse(q, k)
    assert lse[0, 1].isposinf().sum() > 20 and lse[0, 1].isfinite().sum() > 20 and lse[0, 1, 7].isnan()
    torch.testing.assert_close(lse, want, rtol=2e-5, atol=2e-5, equal_nan=True)
    for given_lse in (want, torch.zeros_like(want)):
        mass, want_mass = (f(q, k, given_lse, 5, 32) for f in (block_mass, reference.block_mass))
        torch.testing.assert_close(mass, want_mass, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert mass.isnan().any() and mass.isinf().any() == (given_lse is not want)


def test_expanded_lengths() -> None:
    q, k = tensors()
    one = torch.tensor([90])
    lse = score_lse(q, k, kv_len=one.expand(2))
    assert torch.equal(lse, score_lse(q, k, kv_len=torch.tensor([90, 90])))
    mass = block_mass(q, k, lse, 64, 64, kv_len=one.expand(2))
    assert torch.equal(mass, block_mass(q, k, lse, 64, 64, kv_len=torch.tensor([90, 90])))


def test_threads_do_not_keep_large_buffers(run_python) -> None:
    """A tile of queries of fold 1024 and head dim 256 has 96 MiB."""
    run_python("""
import gc, pathlib
import torch
from vdit_fast.ops import block_mass, score_lse

def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
q, k = torch.randn(2, 1, 2048, 1, 256).unbind(0)
block_mass(q[:, :64], k[:, :64], score_lse(q[:, :64], k[:, :64]), 8, 8)
before = resident()
lse = score_lse(q, k, fold=1024)
assert resident() < before + (60 << 20), "score_lse"
block_mass(q, k, lse, 1, 1, fold=1024)
assert resident() < before + (60 << 20), "block_mass"
""")


@pytest.mark.parametrize(("lq", "lk", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 5, 0)])
def test_empty_tensors(lq: int, lk: int, batch: int) -> None:
    q, k = tensors(lq, lk, batch)
    lse = score_lse(q, k, fold=2)
    assert lse.shape == (batch, 4, -(-lq // 2)) and lse.numel() == (12 if (lq, batch) == (5, 1) else 0)
    assert (lse == -torch.inf).all()
    mass = block_mass(q, k, lse, 2, 2, fold=2)
    assert mass.shape == (batch, 4, -(-lq // 4), -(-lk // 4)) and mass.numel() == 0


def test_no_gradient() -> None:
    q, k = (t.requires_grad_() for t in tensors())
    lse = score_lse(q, k)
    assert not lse.requires_grad and not block_mass(q, k, lse.requires_grad_(), 64, 64).requires_grad


@pytest.mark.parametrize("fold", [1, 3])
def test_opcheck(fold: int) -> None:
    q, k = tensors(50, 70)
    kv_len = torch.tensor([60, 3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.vdit_fast.score_lse.default, (q, k, 0.2, fold, kv_len))
    lse = score_lse(q, k, fold=fold)
    torch.library.opcheck(torch.ops.vdit_fast.block_mass.default, (q, k, lse, 5, 7, 0.2, fold, None))


def test_compiles_with_changing_lengths() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def search(q: Tensor, k: Tensor) -> Tensor:
        return block_mass(q, k, score_lse(q, k, fold=2), 8, 8, fold=2) * 2

    for n in (70, 131):
        q, k = tensors(n, n + 5)
        assert torch.equal(search(q, k), block_mass(q, k, score_lse(q, k, fold=2), 8, 8, fold=2) * 2)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", ["score_lse", "block_mass"])
def test_bad_arguments(case: str, op: str) -> None:
    change, message = BAD[case]
    q, k, options = change(*tensors(), {})
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        if op == "score_lse":
            score_lse(q, k, **options)
        else:
            block_mass(q, k, torch.zeros(2, 4, 130), 64, 64, **options)


@pytest.mark.parametrize(
    ("lse", "blocks", "fold", "message"),
    [
        (torch.zeros(2, 4, 130).double(), (64, 64), 1, "lse is float64"),
        (torch.zeros(2, 130, 4), (64, 64), 1, r"lse is float32 \[2, 130, 4\].*\[2, 4, 130\] on cpu"),
        (torch.zeros(2, 4, 130), (64, 64), 2, r"\[2, 4, 65\] on cpu"),
        (torch.zeros(2, 4, 130), (0, 64), 1, "q_block is 0; expected at least 1"),
        (torch.zeros(2, 4, 130), (64, -3), 1, "kv_block is -3"),
    ],
)
def test_bad_mass_arguments(lse: Tensor, blocks: tuple[int, int], fold: int, message: str) -> None:
    q, k = tensors()
    with pytest.raises(RuntimeError, match=f"block_mass: .*{message}"):
        block_mass(q, k, lse, *blocks, fold=fold)


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize(("n", "dtype"), [(70, torch.float32), (161, torch.bfloat16), (161, torch.float16)], ids=str)
def test_odd_sizes_against_the_reference(n: int, dtype: torch.dtype, fold: int) -> None:
    q, k = (torch.randn(2, m, 4, 40).to(dtype) for m in (n, n + 30))
    kv_len = torch.tensor([n + 30, 43])
    lse = score_lse(q, k, fold=fold, kv_len=kv_len)
    torch.testing.assert_close(lse, reference.score_lse(q, k, fold=fold, kv_len=kv_len), rtol=2e-6, atol=2e-6)
    lse[0, 1, ::2] -= 200
    mass = block_mass(q, k, lse, 50, 21, fold=fold, kv_len=kv_len)
    want = reference.block_mass(q, k, lse, 50, 21, fold=fold, kv_len=kv_len)
    torch.testing.assert_close(mass, want, rtol=2e-5, atol=1e-6)
