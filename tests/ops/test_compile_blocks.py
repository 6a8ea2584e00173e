"""compile_blocks: the same lists as the whole-tensor twin, as an operator, and with bad input."""

from __future__ import annotations

import pytest
import torch
from block_maps import Map, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_fast.ops import compile_blocks
from vdit_fast.plan.runs import compile_blocks_reference


def arguments(m: Map) -> tuple[Tensor, Tensor, Tensor, int, int | None]:
    return m.keep, m.q_len, m.kv_len, m.lq, m.q_tile


def check(m: Map) -> None:
    want = compile_blocks_reference(m.keep, m.q_len, m.kv_len, lq=m.lq, q_tile=m.q_tile)
    for name, a, b in zip(("tiles", "run_ptr", "runs"), compile_blocks(*arguments(m)), want, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b), name


@settings(deadline=None, max_examples=150)
@given(
    groups=st.integers(1, 4),
    nq=st.integers(1, 9),
    nk=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    empty=st.sampled_from([0.0, 0.3, 0.9]),
    shared=st.tuples(st.booleans(), st.booleans()),
    q_tile=st.sampled_from([None, 1, 16, 100]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(groups, nq, nk, density, empty, shared, q_tile, seed) -> None:
    check(draw(groups, nq, nk, density=density, empty=empty, shared=shared, q_tile=q_tile, seed=seed))


@pytest.mark.parametrize("nk", [7, 8, 9, 63, 64, 65, 127, 128, 129, 630])
def test_words_of_bits(nk: int) -> None:
    for density in (0.3, 1.0):
        check(draw(3, 50, nk, density=density, empty=0.0, seed=nk))
    alternating = draw(1, 2, nk, empty=0.0)
    alternating.keep[:] = torch.arange(nk) % 2 == torch.arange(2)[:, None]
    check(alternating)


def test_equal_work_keeps_the_order_of_the_blocks() -> None:
    keep, lengths = torch.ones(2, 300, 4, dtype=torch.bool), torch.full((1, 300), 8)
    tiles, run_ptr, runs = compile_blocks(keep, lengths, torch.full((1, 4), 16), 2400)
    assert torch.equal(tiles[:, 0] * 2400 + tiles[:, 1], torch.arange(600, dtype=torch.int32) * 8)
    assert torch.equal(runs, torch.tensor([[0, 64, -1]], dtype=torch.int32).expand(600, 3))
    assert torch.equal(run_ptr, torch.arange(601, dtype=torch.int32))


def test_bitwise_equal_for_any_number_of_threads() -> None:
    m, threads = draw(6, 80, 130), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(compile_blocks(*arguments(m)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


def test_strides_and_empty_maps() -> None:
    m = draw(4, 6, 9, empty=0.0)
    t = m.keep.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(compile_blocks(t, *arguments(m)[1:]), compile_blocks(*arguments(m)), strict=True):
        assert torch.equal(a, b)
    lengths = torch.zeros(1, 0, dtype=torch.int64)
    tiles, run_ptr, runs = compile_blocks(m.keep[:0], m.q_len, m.kv_len, m.lq)
    assert tiles.shape == (0, 3) and run_ptr.tolist() == [0] and runs.shape == (0, 3)
    tiles, run_ptr, runs = compile_blocks(m.keep[:, :, :0], m.q_len, lengths, m.lq)
    assert len(tiles) == 24 and not run_ptr.any() and runs.shape == (0, 3)


def test_tiles_larger_than_everything() -> None:
    m = draw(3, 5, 7)
    for q_tile in (m.lq, 2**63 - 1):
        got, want = compile_blocks(*arguments(m)[:4], q_tile), compile_blocks(*arguments(m))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_any_byte_but_0_is_true() -> None:
    m = draw(3, 5, 77)
    values = torch.randint(1, 256, m.keep.shape, dtype=torch.uint8)
    odd = torch.where(m.keep, values, 0).to(torch.uint8).view(torch.bool)
    got, want = compile_blocks(odd, *arguments(m)[1:]), compile_blocks(*arguments(m))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_opcheck() -> None:
    for q_tile in (None, 16):
        torch.library.opcheck(torch.ops.vdit_fast.compile_blocks, arguments(draw(2, 5, 40, q_tile=q_tile)))


def test_shapes_on_a_device_without_values() -> None:
    m = draw(3, 5, 7, q_tile=16)
    there = (t.to("meta") for t in (m.keep, m.q_len, m.kv_len))
    tiles, run_ptr, runs = compile_blocks(*there, 100, 16)
    assert [len(t) for t in (tiles, run_ptr, runs)] == [3 * (5 + 6), 3 * (5 + 6) + 1, 3 * (5 + 6) * 4]
    none = torch.zeros(3, 0, 7, dtype=torch.bool, device="meta"), torch.zeros(1, 0, dtype=torch.int64, device="meta")
    tiles, run_ptr, runs = compile_blocks(*none, m.kv_len.to("meta"), 100, 16)
    assert [len(t) for t in (tiles, run_ptr, runs)] == [0, 1, 0]


M = draw(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": M.keep.int()}, r"keep is int32 \[2, 3, 4\]; expected bool \[groups, query blocks, key blocks\]"),
        ({"keep": M.keep[0]}, r"keep is bool \[3, 4\]"),
        ({"q_len": M.q_len.int()}, r"q_len is int32 \[1, 3\]; expected int64 \[1, 3\] or \[2, 3\]"),
        ({"q_len": M.q_len[0]}, r"q_len is int64 \[3\]"),
        ({"kv_len": M.q_len}, r"kv_len is int64 \[1, 3\]; expected int64 \[1, 4\] or \[2, 4\]"),
        ({"kv_len": M.kv_len.expand(3, 4)}, r"kv_len is int64 \[3, 4\]"),
        ({"lq": -1}, "lq is -1"),
        ({"lq": 2**31}, "lq is 2147483648; expected 0 to 2147483647"),
        ({"lq": M.lq - 1}, rf"q_len\[0\] sums to more than lq, {M.lq - 1}"),
        ({"q_len": torch.tensor([[5, -1, 0]])}, r"q_len\[0, 1\] is -1; lengths are at least 0"),
        ({"kv_len": torch.tensor([[0, 2, 0, 1], [0, 2, 0, -(2**63)]])}, r"kv_len\[1, 3\] is -9223372036854775808"),
        (
            {"kv_len": torch.tensor([[2**31 - 1, 0, 0, 1]])},
            r"kv_len\[0\] sums to more than int32 can index, 2147483647",
        ),
        ({"kv_len": torch.full((1, 4), 2**62)}, r"kv_len\[0\] sums to more than"),
        ({"q_tile": 0}, "q_tile is 0; expected at least 1"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        compile_blocks(**{**vars(M), **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same kernels")
@pytest.mark.parametrize("q_tile", [None, 16])
def test_cuda_equals_the_reference(q_tile: int | None) -> None:
    for nk in (1, 33, 630):
        m = draw(5, 300, nk, shared=(False, False), q_tile=q_tile, seed=nk)
        want = compile_blocks_reference(m.keep, m.q_len, m.kv_len, lq=m.lq, q_tile=q_tile, trim=False)
        there = [t.cuda() for t in (m.keep, m.q_len, m.kv_len)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = compile_blocks(*there, m.lq, q_tile)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_without_query_blocks() -> None:
    keep = torch.ones(2, 0, 5, dtype=torch.bool, device="cuda")
    lengths = [torch.zeros(1, n, dtype=torch.int64, device="cuda") for n in (0, 5)]
    tiles, run_ptr, runs = compile_blocks(keep, *lengths, 100, 16)
    assert tiles.shape == (0, 3) and run_ptr.tolist() == [0] and runs.shape == (0, 3)
