"""gather_rows and scatter_rows against their references, as operators, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vdit_fast import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same")


def draw_rows(batch: int, tokens: int, slots: int) -> Tensor:
    """int32 [batch, slots]: distinct rows in random order."""
    return torch.rand(batch, tokens).argsort(-1)[:, :slots].to(torch.int32)


def strided(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    """[B, N, ...] with contiguous rows."""
    b, n, *row = shape
    if kind == "inside a longer sequence":
        return torch.randn(b, n + 5, *row).to(dtype)[:, 3 : 3 + n]
    if kind == "part of a wider row":
        width = torch.Size(row).numel()
        return torch.randn(b, n, 3 * width + 1).to(dtype)[..., width : 2 * width].unflatten(2, row)
    if kind == "batch last":
        return torch.randn(n, b, *row).to(dtype).transpose(0, 1)
    return torch.randn(shape).to(dtype)


KINDS = ["contiguous", "inside a longer sequence", "part of a wider row", "batch last"]


def close(got: Tensor, x: Tensor, y: Tensor, rows: Tensor, count: Tensor | None, **how) -> None:
    """got against fp64, at most twice as far as the reference in the tensors' dtype, plus one rounding."""
    exact = reference.scatter_rows(x.double(), y.double(), rows, count, **how)
    plain = reference.scatter_rows(x, y, rows, count, **how)
    allowed = 2 * (plain.double() - exact).abs() + torch.finfo(got.dtype).eps * exact.abs()
    assert ((got.double() - exact).abs() <= allowed).all()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 130), st.integers(1, 70)),
    share=st.floats(0, 1),
    dtype=st.sampled_from([*DTYPES, torch.int64, torch.uint8]),
    kind=st.sampled_from(KINDS),
    counted=st.booleans(),
    common=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_of_any_shape(shape, share, dtype, kind, counted, common, seed) -> None:
    torch.manual_seed(seed)
    b, n, _ = shape
    slots = max(1, round(share * n))
    rows = draw_rows(1 if common else b, n, slots)
    count = torch.randint(0, slots + 1, (rows.shape[0],), dtype=torch.int32) if counted else None
    if count is not None:  # what is not in use may hold anything
        rows[torch.arange(slots) >= count[:, None]] = 2**31 - 1
    x = (
        strided(shape, kind, torch.float32).mul(50).to(dtype)
        if not dtype.is_floating_point
        else strided(shape, kind, dtype)
    )
    y = ops.gather_rows(x, rows, count)
    assert torch.equal(y, reference.gather_rows(x, rows, count)) and y.is_contiguous()
    new = torch.flip(y, (2,))
    want = reference.scatter_rows(x, new, rows, count)
    ops.scatter_rows(x, new, rows, count)
    assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_gate_and_add(width: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    b, n, slots = 2, 41, 17
    rows, count = draw_rows(b, n, slots), torch.tensor([17, 5], dtype=torch.int32)
    for gate_shape in (None, (b, slots, width), (b, 1, width), (1, slots, 1), (1, 1, 1)):
        for gate_dtype in (dtype, torch.float32):
            for add in (False, True):
                x, y = strided((b, n, width), kind, dtype), strided((b, slots, width), kind, dtype)
                gate = None if gate_shape is None else torch.randn(gate_shape).to(gate_dtype)
                before = x.clone()
                ops.scatter_rows(x, y, rows, count, gate=gate, add=add)
                close(x, before, y, rows, count, gate=gate, add=add)
                untouched = torch.ones(b, n, dtype=torch.bool)
                for i in range(b):
                    untouched[i, rows[i, : count[i]].long()] = False
                assert torch.equal(x[untouched], before[untouched])


def test_several_tensors_in_one_call() -> None:
    """Keys and values of a cache, of unlike head dims and dtypes, at rows that all items share."""
    k, v = torch.randn(2, 50, 3, 16), torch.randn(2, 50, 3, 24).half()
    rows = draw_rows(1, 50, 20)
    new_k, new_v = torch.randn(2, 20, 3, 16), torch.randn(2, 20, 3, 24).half()
    want = [reference.scatter_rows(*pair, rows) for pair in ((k, new_k), (v, new_v))]
    ops.scatter_rows((k, v), (new_k, new_v), rows)
    assert torch.equal(k, want[0]) and torch.equal(v, want[1])
    again = ops.gather_rows((k, v), rows)
    assert torch.equal(again[0], new_k) and torch.equal(again[1], new_v)


def test_nothing_to_do() -> None:
    x = torch.randn(2, 5, 8)
    before, none = x.clone(), torch.zeros(2, 0, dtype=torch.int32)
    assert ops.gather_rows(x, none).shape == (2, 0, 8)
    ops.scatter_rows(x, torch.zeros(2, 0, 8), none)
    ops.scatter_rows(x, torch.zeros(2, 3, 8), draw_rows(1, 5, 3), torch.tensor([0], dtype=torch.int32))
    assert torch.equal(x, before)
    assert ops.gather_rows(x[:0], none[:0]).shape == (0, 0, 8)
    assert not ops.gather_rows(x, draw_rows(1, 5, 3), torch.tensor([0], dtype=torch.int32)).any()


def test_bits_of_nan_are_moved() -> None:
    bits = torch.randint(-(2**15), 2**15, (1, 20, 9)).to(torch.int16)
    x, rows = bits.view(torch.float16), draw_rows(1, 20, 11)
    assert torch.equal(ops.gather_rows(x, rows).view(torch.int16), bits[:, rows[0].long()])


def test_opcheck() -> None:
    rows, count = draw_rows(2, 9, 4), torch.tensor([4, 2], dtype=torch.int32)
    x, y = torch.randn(2, 9, 8), torch.randn(2, 4, 8)
    torch.library.opcheck(torch.ops.vdit_fast.gather_rows, ([x, x.half()], rows, count))
    torch.library.opcheck(torch.ops.vdit_fast.gather_rows, ([x.clone().requires_grad_()], rows, count))
    torch.library.opcheck(torch.ops.vdit_fast.scatter_rows, ([x], [y], rows, count, torch.randn(1, 1, 8), True))


def test_gradient_of_gather() -> None:
    rows, count = draw_rows(2, 9, 4), torch.tensor([4, 2], dtype=torch.int32)
    x, weight = torch.randn(2, 9, 3, 8, requires_grad=True), torch.randn(2, 4, 3, 8)
    got, want = (
        torch.autograd.grad((f(x, rows, count) * weight).sum(), x)[0] for f in (ops.gather_rows, reference.gather_rows)
    )
    assert torch.equal(got, want)
    other = torch.randn(2, 9, 5, requires_grad=True)
    first, _ = ops.gather_rows((x, other), rows, count)  # one of the results is not used
    assert torch.equal(torch.autograd.grad((first * weight).sum(), x)[0], want)


def test_scatter_refuses_gradients_and_counts_as_a_change() -> None:
    rows = draw_rows(1, 9, 4)
    x, y = torch.randn(2, 9, 8), torch.randn(2, 4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="scatter_rows has no gradient"):
        ops.scatter_rows(x, y, rows)
    version = x._version
    ops.scatter_rows(x, y.detach(), rows)
    assert x._version > version
    got = reference.scatter_rows(x, y, rows, add=True)
    assert torch.autograd.grad(got.sum(), y)[0].eq(1).all()


def test_compiles_without_a_break() -> None:
    rows = draw_rows(1, 9, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x: Tensor, gate: Tensor) -> Tensor:
        out = x.clone()
        ops.scatter_rows(out, ops.gather_rows(x, rows) * 2, rows, gate=gate, add=True)
        return out

    x, gate = torch.randn(2, 9, 8), torch.randn(1, 1, 8)
    want = reference.scatter_rows(x, x[:, rows[0].long()] * 2, rows, gate=gate, add=True)
    torch.testing.assert_close(f(x, gate), want)


def test_bad_input() -> None:
    x, y, rows = torch.randn(2, 9, 8), torch.randn(2, 4, 8), draw_rows(2, 9, 4)
    wild = rows.clone()
    wild[1, 2] = 9
    for arguments, message in (
        (([], rows), "0 tensors; pass 1 to 4"),
        (([x] * 5, rows), "5 tensors; pass 1 to 4"),
        (([x[0]], rows), r"full\[0\] has shape \[9, 8\]"),
        (([x.transpose(1, 2)], rows), "a row must be contiguous"),
        (([x, x[:, :5]], rows), "batch and rows must be the same"),
        (([x], rows.long()), "rows is int64; expected int32"),
        (([x], rows[0]), r"rows has shape \[4\]"),
        (([x], rows.repeat(2, 1)), r"expected \[1 or 2, slots\]"),
        (([x], rows, torch.tensor([1, 2])), "count is int64"),
        (([x], rows, torch.zeros(3, dtype=torch.int32)), r"count has shape \[3\]"),
        (([x], wild), "rows has entries outside 0 to 8"),
        (([x], wild - 20), "rows has entries outside 0 to 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.gather_rows(*arguments)
    twice = rows.clone()
    twice[1, 3] = twice[1, 0]
    for arguments, options, message in (
        ((x, [y, y], rows), {}, "1 full tensors but 2"),
        ((x, y[:, :3], rows), {}, r"part\[0\] has shape \[2, 3, 8\]"),
        ((x, y.half(), rows), {}, "part.0. is float16"),
        ((x, y, twice), {}, f"rows names row {twice[1, 0]} of item 1 twice"),
        ((x, y, wild), {}, "rows has entries outside"),
        ((x[:1].expand(2, 9, 8), y, rows), {}, "stride 0 in dimension 0"),
        (([x, x], [y, y], rows), {}, "are the same memory"),
        ((x, y, rows), {"gate": torch.ones(2, 8)}, r"gate has shape \[2, 8\]"),
        ((x, y, rows), {"gate": torch.ones(2, 3, 8)}, "expected .1 or 2, 1 or 4, 1 or 8."),
        ((x, y, rows), {"gate": torch.ones(1, 1, 8).half()}, "gate is float16"),
        ((x, y, rows), {"gate": torch.ones(1, 1, 16)[..., ::2]}, "must be contiguous there"),
        ((x.long(), y.long(), rows), {"add": True}, "int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.scatter_rows(*arguments, **options)


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(2, 1000, 3, 64, dtype=dtype, device="cuda")
        rows = draw_rows(2, 1000, 311).cuda()
        count = torch.tensor([311, 40], dtype=torch.int32, device="cuda")
        y = ops.gather_rows(x, rows, count)
        assert torch.equal(y, reference.gather_rows(x, rows, count))
        gate = torch.randn(2, 311, 1, device="cuda")
        for how in ({}, {"add": True}, {"gate": gate, "add": True}):
            new = x.clone()
            ops.scatter_rows(new, y * 2, rows, count, **how)
            torch.testing.assert_close(new, reference.scatter_rows(x, y * 2, rows, count, **how))


def test_memory_that_is_shared_is_refused() -> None:
    rows = torch.tensor([[2, 3, 4]], dtype=torch.int32)
    x = torch.randn(1, 6, 4)
    with pytest.raises(RuntimeError, match=r"part\[0\] overlaps full\[0\]"):
        ops.scatter_rows(x, x[:, 1:4], rows)
    a, b = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    all_rows = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="overlaps"):
        ops.scatter_rows([a, b], [b, a], all_rows)
    with pytest.raises(RuntimeError, match="rows that share memory"):
        ops.scatter_rows(torch.randn(40).unfold(0, 8, 4)[None], torch.randn(1, 3, 8), all_rows)
    kv = torch.randn(1, 6, 16)
    with pytest.raises(RuntimeError, match="same memory"):
        ops.scatter_rows([kv[..., :8], kv[..., 4:12]], [torch.randn(1, 3, 8), torch.randn(1, 3, 8)], rows)
    with pytest.raises(RuntimeError, match="gate overlaps"):
        ops.scatter_rows(x, torch.randn(1, 3, 4), rows, gate=x[:, :3])
    new = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    ops.scatter_rows([kv[..., :8], kv[..., 8:]], list(new), rows)  # side by side, as keys and values often lie
    assert torch.equal(kv[0, 2:5], torch.cat(new, -1)[0])


def test_nothing_is_written_before_a_row_is_refused() -> None:
    x = torch.randn(1, 4, 8)
    before = x.clone()
    with pytest.raises(RuntimeError):
        ops.scatter_rows(x, torch.randn(1, 3, 8), torch.tensor([[0, 9, 1]], dtype=torch.int32))
    assert torch.equal(x, before)


def test_gradients_of_repeated_rows_add_up() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float32, requires_grad=True)
    rows = torch.tensor([[1, 1, 4]], dtype=torch.int32)
    weights = torch.randn(2, 3, 3)
    (ops.gather_rows(x, rows) * weights).sum().backward()
    want = torch.zeros(2, 5, 3)
    want[:, 1], want[:, 4] = weights[:, 0] + weights[:, 1], weights[:, 2]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want)
