"""softmax_mass on the CPU: fp64 over shapes, strides and options, the two-pass form, infinities, bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_inputs import BAD, BLOCKS, DTYPES, LENGTHS, STRIDES, strided, tensors, worst

from vdit_fast import reference
from vdit_fast.ops import block_mass, score_lse, softmax_mass


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    lq=st.sampled_from(LENGTHS),
    lk=st.sampled_from(LENGTHS),
    dim=st.sampled_from([1, 20, 64, 72, 256]),
    fold=st.sampled_from([1, 1, 2, 3, 8, 16]),
    blocks=st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)),
    stride=st.sampled_from(STRIDES),
    options=st.sets(st.sampled_from(["kv_len", "q_len", "scale"])),
    magnitude=st.sampled_from([1.0, 12.0]),
    seed=st.integers(0, 2**16),
)
def test_against_fp64(dtype, batch, heads, lq, lk, dim, fold, blocks, stride, options, magnitude, seed):
    q, k = tensors(lq, lk, batch, *heads, dim, dtype, seed)
    k = k * magnitude
    g = torch.Generator().manual_seed(seed + 1)
    call = {
        "scale": -0.07 if "scale" in options else dim**-0.5 / fold,
        "fold": fold,
        "q_len": torch.randint(0, lq + 1, (batch,), generator=g) if "q_len" in options else None,
        "kv_len": torch.randint(0, lk + 1, (batch,), generator=g) if "kv_len" in options else None,
    }
    mass = softmax_mass(strided(q, stride), strided(k, stride), *blocks, **call)
    want = reference.softmax_mass(q.double(), k.double(), *blocks, **call)
    base = reference.softmax_mass(q.float(), k.float(), *blocks, **call)
    assert mass.dtype == torch.float32 and mass.is_contiguous() and mass.shape == want.shape
    assert worst(mass, want) <= 2 * worst(base, want) + 1e-6 * magnitude * float(want.max())
    assert not mass[want == 0].any()  # no key, or no row that counts: exactly 0


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize("blocks", [(64, 64), (5, 7), (1, 1), (300, 100), (7, 2**63 - 1)], ids=str)
def test_is_block_mass_with_its_own_lse(fold: int, blocks: tuple[int, int]) -> None:
    q, k = tensors(310, 333)
    q_len, kv_len = torch.tensor([310, 100]), torch.tensor([200, 333])
    mass = softmax_mass(q, k, *blocks, fold=fold, q_len=q_len, kv_len=kv_len)
    q = q.masked_fill((torch.arange(310) >= q_len[:, None])[..., None, None], 0)
    lse = score_lse(q, k, fold=fold, kv_len=kv_len)
    lse[1, :, -(-100 // fold) :] = -torch.inf
    torch.testing.assert_close(
        mass, block_mass(q, k, lse, *blocks, fold=fold, kv_len=kv_len), rtol=2e-6, atol=2e-6 * float(mass.max())
    )


@pytest.mark.parametrize("fold", [1, 4])
@pytest.mark.parametrize("tokens", [1, 63, 65, 129, 311])
def test_rows_sum_to_their_valid_queries(tokens: int, fold: int) -> None:
    q, k = tensors(tokens, 337)
    q_len = torch.tensor([tokens, tokens // 2])
    mass = softmax_mass(q, k, 32, 50, fold=fold, q_len=q_len)
    for item, valid in enumerate((-(-q_len // fold)).tolist()):
        rows = (valid - torch.arange(0, -(-tokens // fold), 32)).clamp(0, 32).float()
        torch.testing.assert_close(mass[item].sum(-1), rows.expand(4, -1), rtol=1e-5, atol=0)


def test_scores_that_grow_along_the_keys() -> None:
    """Every stage raises the maximum: sums of earlier ones, in the block and before it, shrink."""
    q, k = torch.ones(1, 100, 1, 4), torch.linspace(-150, 150, 700)[None, :, None, None].expand(1, 700, 1, 4)
    for keys in (k, k.flip(1)):
        for kv_block in (16, 90, 700):
            got = softmax_mass(q, keys.contiguous(), 100, kv_block, scale=0.25)
            want = reference.softmax_mass(q.double(), keys.double(), 100, kv_block, scale=0.25)
            assert worst(got, want) <= 1e-5 * float(want.max()) and (got[want > 1e-30] > 0).all()


def test_one_long_row_in_one_block() -> None:
    q, k = tensors(2, 2**20 + 1, 1, 1, 1, 8)
    torch.testing.assert_close(softmax_mass(q, k, 2, 2**20 + 1), torch.full((1, 1, 1, 1), 2.0), rtol=1e-6, atol=0)


def test_what_is_not_read_may_hold_anything() -> None:
    q, k = tensors()
    call = {"fold": 3, "q_len": torch.tensor([50, 130]), "kv_len": torch.tensor([100, 0])}
    clean = softmax_mass(q, k, 4, 5, **call)
    q[0, 50:], k[0, 100:], k[1] = torch.nan, torch.nan, torch.inf
    assert torch.equal(softmax_mass(q, k, 4, 5, **call), clean)
    assert clean[0].any() and not clean[1].any() and not clean[0, :, 5:].any()


@pytest.mark.parametrize("key", [0, 40, 70, 149])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_scores_and_nan(dtype: torch.dtype, key: int) -> None:
    """As block_mass with the LSE of score_lse: +inf makes its block NaN and the others 0, NaN the row of blocks."""
    q, k = tensors(dtype=dtype, kv_heads=4)
    k[0, key, 1, 3] = torch.inf  # scores of both signs
    k[1, key, 2, 3] = k[1, 100, 2, 3] = torch.inf
    q[1, 5, 2, 4], q[0, 7, 1, 3] = torch.nan, 0.0
    mass, want = (f(q, k, 1, 32) for f in (softmax_mass, reference.softmax_mass))
    torch.testing.assert_close(mass, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert mass[1, 2, 5].isnan().all() and mass[0, 1, 7].isnan().all()
    some = mass[0, 1].isnan()
    assert (some.sum(-1) == 1).any() and (some.sum(-1) == 0).any()


def test_scores_of_minus_infinity_alone_count_nothing() -> None:
    q, k = torch.ones(1, 9, 1, 8), torch.full((1, 70, 1, 8), -torch.inf)
    k[0, 66:] = 1.0
    torch.testing.assert_close(softmax_mass(q, k, 3, 66), torch.tensor([0.0, 3.0]).expand(1, 1, 3, 2))
    assert not softmax_mass(q, k[:, :66], 3, 10).any()


@pytest.mark.parametrize(("lq", "lk", "batch"), [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 5, 0)])
def test_empty_tensors(lq: int, lk: int, batch: int) -> None:
    mass = softmax_mass(*tensors(lq, lk, batch), 2, 2, fold=2)
    assert mass.shape == (batch, 4, -(-lq // 4), -(-lk // 4)) and mass.numel() == 0


def test_compiles_with_changing_lengths() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def search(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return softmax_mass(q, k, 8, 8, fold=2) * 2

    for n in (70, 131):
        q, k = tensors(n, n + 5)
        assert torch.equal(search(q, k), softmax_mass(q, k, 8, 8, fold=2) * 2)


def test_threads_do_not_keep_large_buffers(run_python) -> None:
    """The parts of 96 rows and 400,000 blocks of keys have 307 MB."""
    run_python("""
import gc, pathlib
import torch
from vdit_fast.ops import softmax_mass

def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
q, k = torch.randn(1, 96, 1, 1), torch.randn(1, 400_000, 1, 1)
softmax_mass(q[:, :64], k[:, :64], 8, 8)
before = resident()
softmax_mass(q, k, 96, 1)
assert resident() < before + (60 << 20)
""")


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    change, message = BAD[case]
    q, k, options = change(*tensors(), {})
    with pytest.raises(RuntimeError, match=f"softmax_mass: .*{message}"):
        softmax_mass(q, k, 64, 64, **options)


@pytest.mark.parametrize(
    ("blocks", "q_len", "message"),
    [
        ((0, 64), None, "q_block is 0; expected at least 1"),
        ((64, -3), None, "kv_block is -3"),
        ((64, 64), torch.ones(2), "q_len is float32"),
        ((64, 64), torch.tensor([3]), r"q_len is int64 \[1\]"),
        ((64, 64), torch.tensor([3, 131]), r"q_len\[1\] is 131; expected 0 to 130"),
    ],
)
def test_bad_mass_arguments(blocks: tuple[int, int], q_len: torch.Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"softmax_mass: .*{message}"):
        softmax_mass(*tensors(), *blocks, q_len=q_len)


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize(("n", "dtype"), [(70, torch.float32), (161, torch.bfloat16), (161, torch.float16)], ids=str)
def test_odd_sizes_against_the_reference(n: int, dtype: torch.dtype, fold: int) -> None:
    for blocks in ((50, 21), (16, 16), (200, 300)):
        q, k = (torch.randn(2, m, 4, 40).to(dtype) for m in (n, n + 30))
        call = {"fold": fold, "q_len": torch.tensor([n, 33]), "kv_len": torch.tensor([n + 30, 43])}
        mass, want = softmax_mass(q, k, *blocks, **call), reference.softmax_mass(q, k, *blocks, **call)
        torch.testing.assert_close(mass, want, rtol=2e-5, atol=1e-6)
