"""qk_norm_rope as an operator: layouts against fp64, destinations, gradients, special values, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qk_cases import CASES, Case
from torch import Tensor

import vdit_fast
from vdit_fast.ops import qk_norm_rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["generic", "avx2", "avx512"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the emulator runs the same")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    call = case.build(dtype)
    got = call.run()
    call.check(got)
    for a, b in zip(got, call.run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    call = case.build(dtype, "cuda")
    call.check(call.run())


@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 5),
    half=st.integers(1, 90),
    odd=st.integers(0, 1),
    tokens=st.integers(1, 9),
    norm=st.sampled_from(["none", "rms", "rms_across", "layer"]),
    rope=st.sampled_from(["interleaved", "half", "none"]),
    table=st.sampled_from(["full", "half"]),
    per=st.sampled_from(["", "batch", "head"]),
    layout=st.sampled_from(["contiguous", "fused", "heads first", "odd start", "broadcast"]),
    place=st.sampled_from(["", "joint", "permuted per head"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(heads, half, odd, tokens, norm, rope, table, per, layout, place, dtype, seed) -> None:
    torch.manual_seed(seed)
    case = Case(
        "any", heads=heads, dim=2 * half + odd, tokens=tokens, norm=norm, rope=rope, table=table, per=per,
        layout=layout, place=place, bias=norm == "layer",
    )  # fmt: skip
    call = case.build(dtype)
    call.check(call.run())


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """Some of the same cases where the processor has the instructions."""
    environment = {**os.environ, "VDIT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    probe = "import vdit_fast, torch; vdit_fast.ops.qk_norm_rope(torch.ones(1, 1, 1, 2))"
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this processor or build has no {isa}")
    some = "across or axes or odd or table or eager_rounding and (cosmos or ltx2 or sana)"
    arguments = ["-q", "-p", "no:cacheprovider", "-k", f"float16 and not gpu and ({some})"]
    files = [__file__, str(__file__).replace("rope.py", "rope_families.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *files], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---- destinations


def _table(tokens: int, dim: int) -> dict[str, Tensor]:
    angles = torch.rand(tokens, dim) * 6
    return {"cos": angles.cos(), "sin": angles.sin()}


def test_two_streams_share_one_buffer() -> None:
    """HunyuanVideo's dual block: video and text with norms of their own, then attention over both."""
    torch.manual_seed(0)
    video, text = (torch.randn(3, 2, n, 3, 64).bfloat16() for n in (7, 4))
    weights = torch.randn(4, 64).bfloat16()
    joint = torch.full((3, 2, 11, 3, 64), torch.nan).bfloat16()
    table = _table(7, 64)
    for part, slot, w, rope in (
        (video, slice(0, 7), weights[:2], table),
        (text, slice(7, 11), weights[2:], {}),
    ):
        out = dict(zip(("q_out", "k_out", "v_out"), joint[:, :, slot], strict=True))
        returned = qk_norm_rope(*part, norm="rms", q_weight=w[0], k_weight=w[1], **rope, **out)
        assert all(a is b for a, b in zip(returned, out.values(), strict=True))
    apart = qk_norm_rope(*video, norm="rms", q_weight=weights[0], k_weight=weights[1], **table)
    also = qk_norm_rope(*text, norm="rms", q_weight=weights[2], k_weight=weights[3])
    for whole, a, b in zip(joint, apart, also, strict=True):
        assert torch.equal(whole, torch.cat([a, b], 1))


@pytest.mark.parametrize("rope", ["interleaved", "half"])
def test_in_place(rope: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3 * 2 * 64).bfloat16()
    q, k, v = (t.unflatten(2, (2, 64)) for t in qkv.chunk(3, -1))
    named: dict[str, Any] = {"norm": "rms_across", "rope": rope, **_table(9, 64)}
    want = [t.clone() for t in qk_norm_rope(q, k, v, **named)]
    qk_norm_rope(q, k, v, **named, q_out=q, k_out=k, v_out=v)
    for got, answer in zip((q, k, v), want, strict=True):
        assert torch.equal(got, answer)


def test_rows_are_the_inverse_of_a_permutation() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 3, 16).unbind(0)
    order = torch.rand(2, 3, 12).argsort(-1).int()
    rows = order.argsort(-1).int()
    got = qk_norm_rope(q, k, v, norm="rms", q_rows=rows, kv_rows=rows)
    plain = qk_norm_rope(q, k, v, norm="rms")
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a, vdit_fast.ops.permute_tokens(b, order))


def test_rows_that_no_token_goes_to() -> None:
    q = torch.randn(1, 3, 2, 8)
    rows = torch.tensor([2, 0, 4], dtype=torch.int32)
    out = torch.full((1, 6, 2, 8), 7.0)
    qk_norm_rope(q, q_rows=rows, q_out=out)
    assert torch.equal(out[:, rows.long()], q) and (out[:, [1, 3, 5]] == 7).all()
    got, _, _ = qk_norm_rope(q, q_rows=torch.tensor([1, 1, 2], dtype=torch.int32))
    assert (got[:, 0] == 0).all()


def test_layout_pairs_by_hand() -> None:
    """A quarter turn swaps the channels of a pair and negates one."""
    x = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    cos, sin = torch.zeros(1, 8), torch.ones(1, 8)

    def turned(**named: Any) -> list[float]:
        return qk_norm_rope(x, cos=cos, sin=sin, **named)[0].flatten().tolist()

    assert turned() == [-2, 1, -4, 3, -6, 5, -8, 7]
    assert turned(rope="half") == [-5, -6, -7, -8, 1, 2, 3, 4]
    assert turned(rope="half", axes=(4, 2, 2)) == [-3, -4, 1, 2, -6, 5, -8, 7]
    cos, sin = cos[:, :2], sin[:, :2]
    assert turned(rotary_dim=4) == [-2, 1, -4, 3, 5, 6, 7, 8]


# ---- special values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["none", "rms", "rms_across", "layer"])
def test_nan_and_infinity_stay_in_their_rows(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 3, 16).to(dtype)
    table = _table(6, 16)
    clean = qk_norm_rope(x, norm=norm, **table)[0]
    x[0, 1, 0, 3], x[0, 4, 2, 0] = torch.nan, torch.inf
    got = qk_norm_rope(x, norm=norm, **table)[0]
    touched = torch.zeros(1, 6, 3, 16, dtype=torch.bool)
    if norm == "none":
        touched[0, 1, 0, 2:4] = touched[0, 4, 2, 0:2] = True
    elif norm == "rms_across":
        touched[0, [1, 4]] = True
    else:
        touched[0, 1, 0] = touched[0, 4, 2] = True
    assert torch.equal(got[~touched], clean[~touched])
    assert got[0, 1, 0, 3].isnan()


def test_not_rotated_tokens_do_not_meet_the_table() -> None:
    x = torch.randn(1, 4, 2, 8)
    positions = torch.tensor([0, -1, 0, -1], dtype=torch.int32)
    got = qk_norm_rope(x, cos=torch.full((1, 8), torch.nan), sin=torch.zeros(1, 8), positions=positions)[0]
    assert torch.equal(got[:, 1::2], x[:, 1::2]) and got[:, ::2].isnan().all()


# ---- autograd and torch.compile


@pytest.mark.parametrize("norm", ["rms", "rms_across", "layer"])
def test_gradient_is_that_of_the_reference(norm: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 6, dtype=torch.float64).unbind(0)
    weight = torch.randn(12 if norm == "rms_across" else 6, dtype=torch.float64)
    rows = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32)
    table = {name: t.double() for name, t in _table(5, 6).items()}
    inputs = [t.requires_grad_() for t in (q, k, v, weight)]

    def call(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(q, k, v, norm=norm, q_weight=w, k_weight=w, **table, rope="half", kv_rows=rows)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradient_through_a_destination() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    joint = torch.zeros(1, 6, 2, 8)
    out, _, _ = qk_norm_rope(q, norm="rms", q_out=joint[:, 2:])
    (joint[:, 2:] * torch.randn(1, 4, 2, 8)).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0
    torch.testing.assert_close(out.detach(), qk_norm_rope(q.detach(), norm="rms")[0])


def _arguments(q: Tensor, out: Tensor, **change: Any) -> list[Any]:
    named = {
        "q": q, "k": None, "v": None, "q_weight": None, "q_bias": None, "k_weight": None, "k_bias": None,
        "q_cos": None, "q_sin": None, "k_cos": None, "k_sin": None, "q_positions": None, "k_positions": None,
        "q_rows": None, "kv_rows": None, "norm": 1, "eps": 1e-6, "rotary": 0, "axes": [], "q_start": 0, "k_start": 0,
        "rounding": 0, "round_products": False, "relu": False, "q_out": out, "k_out": None, "v_out": None,
    }  # fmt: skip
    assert set(change) <= set(named)
    return list((named | change).values())


def test_the_raw_operator_refuses_gradients() -> None:
    q = torch.randn(1, 2, 1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.ops.vdit_fast.qk_norm_rope(*_arguments(q, torch.empty(1, 2, 1, 4)))


def test_opcheck() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 8).bfloat16().unbind(0)
    out = torch.empty(3, 2, 9, 2, 8).bfloat16()
    angles = torch.rand(1, 5, 1, 8)
    rows = torch.arange(5, dtype=torch.int32).view(1, 1, 5)
    arguments = _arguments(
        q, out[0], k=k, v=v, q_weight=torch.randn(8), q_cos=angles.cos(), q_sin=angles.sin(), q_positions=rows,
        q_rows=rows, kv_rows=rows, rotary=8, k_out=out[1], v_out=out[2],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.vdit_fast.qk_norm_rope.default, tuple(arguments))


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 6, 2, 16).unbind(0)
    table = _table(6, 16)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        joint = q.new_zeros(3, 1, 8, 2, 16)
        qk_norm_rope(q * 2, k, v, norm="rms", **table, q_out=joint[0, :, 2:], k_out=joint[1, :, 2:])
        new, _, _ = qk_norm_rope(q, norm="layer")
        return joint.sum(0)[:, 2:] + new

    want = block(q, k, v)
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, want)


# ---- bad input


def _bad(**named: Any) -> None:
    q = torch.randn(2, 5, 3, 8)
    qk_norm_rope(named.pop("q", q), named.pop("k", None), named.pop("v", None), **named)


ANGLES = torch.rand(5, 8)
ROWS = torch.randn(2, 5, 3, 8)


@pytest.mark.parametrize(("named", "error", "message"), [
    ({"norm": "group"}, ValueError, "norm is 'group'"),
    ({"rope": "pairs"}, ValueError, "rope is 'pairs'"),
    ({"rounding": "exact"}, ValueError, "rounding is 'exact'"),
    ({"cos": ANGLES}, ValueError, "come together"),
    ({"axes": (8,), "cos": ANGLES, "sin": ANGLES}, ValueError, "axes belong to"),
    ({"rotary_dim": 3, "cos": ANGLES, "sin": ANGLES}, ValueError, "even rotary_dim"),
    ({"positions": torch.zeros(5, dtype=torch.int32)}, ValueError, "no table"),
    ({"cos": ANGLES[:4], "sin": ANGLES[:4]}, ValueError, "4 rows for 5 tokens"),
    ({"cos": ANGLES[0], "sin": ANGLES[0]}, ValueError, "table of q has shape"),
    ({"cos": ANGLES[:4], "sin": ANGLES[:4], "rope_start": 2}, RuntimeError, "rotates 4 tokens from token 2"),
    ({"cos": ANGLES, "sin": ANGLES, "rope_start": -1}, RuntimeError, "from token -1 on"),
    ({"cos": ANGLES, "sin": ANGLES, "rope_start": 2**63 - 1}, RuntimeError, "from token 9223372036854775807"),
    ({"cos": ANGLES[:, :6], "sin": ANGLES[:, :6]}, RuntimeError, "8 or 4"),
    ({"cos": ANGLES, "sin": ANGLES.double()}, RuntimeError, "differ in shape, strides or dtype"),
    ({"cos": ANGLES, "sin": ANGLES, "rope": "half", "axes": (4, 2, 1, 1)}, RuntimeError, "even and positive"),
    ({"cos": ANGLES, "sin": ANGLES, "rope": "half", "axes": (2, 2), "rotary_dim": 8}, RuntimeError, "add up to 4"),
    ({"cos": ANGLES, "sin": ANGLES, "positions": torch.zeros(4, dtype=torch.int32)}, RuntimeError, "q_positions has"),
    ({"cos": ANGLES, "sin": ANGLES, "positions": torch.zeros(5)}, RuntimeError, "expected int32"),
    ({"cos": ANGLES, "sin": ANGLES, "positions": torch.full((5,), 5, dtype=torch.int32)}, RuntimeError, "outside the"),
    ({"q_rows": torch.full((5,), -1, dtype=torch.int32)}, RuntimeError, "q_rows or kv_rows have entries outside"),
    ({"kv_rows": torch.zeros(5, dtype=torch.int32)}, RuntimeError, "neither k nor v"),
    ({"q_weight": torch.randn(8)}, RuntimeError, "q_weight is given, but norm"),
    ({"norm": "rms", "q_weight": torch.randn(7)}, RuntimeError, r"expected \[8\], the head dim"),
    ({"norm": "rms_across", "q_weight": torch.randn(8)}, RuntimeError, r"expected \[24\], heads"),
    ({"norm": "rms", "q_weight": torch.randn(16)[::2]}, RuntimeError, "not contiguous"),
    ({"norm": "layer", "q_bias": torch.randn(8)}, RuntimeError, "needs a weight"),
    ({"norm": "rms", "q_weight": torch.randn(8).half(), "rounding": "eager"}, RuntimeError, "defined for weights"),
    ({"norm": "rms", "eps": -1.0}, RuntimeError, "eps is -1"),
    ({"q": torch.randn(2, 5, 24)}, RuntimeError, r"q has shape \[2, 5, 24\]"),
    ({"q": torch.randn(2, 5, 3, 16)[..., ::2]}, RuntimeError, "contiguous there"),
    ({"q": torch.randn(2, 5, 3, 8).double()}, RuntimeError, "float64"),
    ({"k": torch.randn(2, 5, 3, 6)}, RuntimeError, "batch and head dim"),
    ({"k": torch.randn(2, 5, 3, 8).half()}, RuntimeError, "must be alike"),
    ({"k_out": torch.randn(2, 5, 3, 8)}, RuntimeError, "k is not given"),
    ({"v_out": torch.randn(2, 5, 3, 8)}, RuntimeError, "v is not"),
    ({"q_out": torch.randn(2, 6, 3, 8)}, RuntimeError, "q_out has shape"),
    ({"q_out": torch.randn(2, 5, 3, 8).half()}, RuntimeError, "must be alike"),
    ({"q_out": torch.zeros(2, 1, 3, 8).expand(2, 5, 3, 8)}, RuntimeError, "stride 0 in dimension 1"),
    ({"k": ROWS, "q_out": ROWS, "k_out": ROWS}, RuntimeError, "are the same memory"),
    ({"q": ROWS, "q_out": ROWS, "q_rows": torch.arange(5, dtype=torch.int32)}, RuntimeError, "moves its tokens"),
], ids=lambda x: x if isinstance(x, str) else None)  # fmt: skip
def test_bad_input(named: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _bad(**named)
