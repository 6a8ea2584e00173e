"""Gradients of linear attention: against autograd of the explicit matrix, in fp64 by differences, and their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import BF16, F32, LinearCase, build
from torch import Tensor

from vdit_fast import reference
from vdit_fast.ops import linear_attention, linear_attention_backward, linear_attention_readout, linear_attention_state
from vdit_fast.ops.linear_attention import FEATURE_MAPS

CASES = [
    LinearCase("grad-hedgehog", dim=16, dim_v=12, batch=2),
    LinearCase("grad-no-weight", dim=16, dim_v=8, weight="none"),
    LinearCase("grad-shared", dim=8, dim_v=8, weight="shared", heads=4, kv_heads=2),
    LinearCase("grad-hedgehog-den", dim=8, dim_v=8, den=True),
    LinearCase("grad-relu", dim=16, dim_v=8, feature_map="relu", heads=6, kv_heads=2),
    LinearCase("grad-elu-den", dim=8, dim_v=16, feature_map="elu", den=True),
    LinearCase("grad-identity-den", dim=8, dim_v=8, feature_map="identity", den=True),
    LinearCase("grad-kv-len", dim=8, dim_v=8, batch=3, kv_len=(150, 0, 77)),
    LinearCase("grad-kv-len-den", dim=8, dim_v=8, batch=2, kv_len=(1, 20), den=True, feature_map="elu"),
    LinearCase("grad-sliced", dim=16, dim_v=16, layout="sliced", batch=2),
    LinearCase("grad-length-1", dim=8, dim_v=8, lq=1, lk=1),
]


def leaves(problem: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    named = {"q": problem.q, "k": problem.k, "v": problem.v, **problem.options}
    return {
        n: x.detach().to(dtype).requires_grad_()
        for n, x in named.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def gradients(function: Any, problem: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = leaves(problem, dtype)
    out = function(**{**problem.options, **inputs})
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), direction), strict=True))


def as_exact_as(twin: dict[str, Tensor], got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Errors of gradients are at most twice those of autograd through the explicit matrix in the same precision and
    one rounding of fp32; measured by v's where the gradient is 0, as all others are of one key."""
    for name, gradient in got.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.dtype == twin[name].dtype and gradient.shape == want[name].shape
        scale, of_v = want[name].norm(), want["v"].norm()
        scale = of_v if scale <= 1e-12 * of_v else scale  # what fp64 leaves of 0
        error, own = (float((x[name].double() - want[name]).norm() / scale) for x in (got, twin))
        allowed = 2 * own + torch.finfo(F32).eps
        assert error <= allowed, f"{name}: relative error {error:.2e}, autograd of the matrix {own:.2e}"


@pytest.mark.parametrize("chunk", [1 << 22, 1], ids=["one chunk", "chunks of 64"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_autograd_of_the_matrix(
    case: LinearCase, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_attention_backward, "_CHUNK_FLOATS", chunk)
    problem = build(case)
    got = gradients(linear_attention, problem, dtype)
    want = gradients(reference.linear_attention, problem, torch.float64)
    as_exact_as(gradients(reference.linear_attention, problem, dtype), got, want)


class _State(torch.autograd.Function):
    """The reference forwards, the operator's formula backwards, both in fp64."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, weight: Tensor | None, k_den: Tensor | None, code: int, n: Any
    ) -> Tensor:
        ctx.save_for_backward(k, v, weight, k_den, n)
        ctx.code = code
        return _exact_state(k, v, weight, k_den, code, n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        k, v, weight, k_den, n = ctx.saved_tensors
        found = torch.ops.vdit_fast.linear_attention_state_backward(grad, k, v, ctx.code, weight, k_den, n)
        rest = iter(found[2:])
        return *found[:2], *(None if x is None else next(rest) for x in (weight, k_den)), None, None


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, state: Tensor, weight: Tensor | None, q_den: Tensor | None, code: int) -> Tensor:
        ctx.save_for_backward(q, state, weight, q_den)
        ctx.code = code
        options = {"feature_map": FEATURE_MAPS[code], "weight": weight, "q_den": q_den, "eps": 0.25}
        # the reference rounds nothing in fp64 but reads an fp32 state in the dtype of q
        return reference.linear_attention_readout(q, state, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, state, weight, q_den = ctx.saved_tensors
        found = torch.ops.vdit_fast.linear_attention_readout_backward(grad, q, state, ctx.code, weight, q_den, 0.25)
        rest = iter(found[2:])
        return *found[:2], *(None if x is None else next(rest) for x in (weight, q_den)), None


def _exact_state(k: Tensor, v: Tensor, weight: Tensor | None, k_den: Tensor | None, code: int, n: Any) -> Tensor:
    options = {"feature_map": FEATURE_MAPS[code], "weight": weight, "k_den": k_den, "kv_len": n}
    return reference.linear_attention_state(k, v, **options)


@pytest.mark.parametrize("den", [False, True], ids=["", "den"])
@pytest.mark.parametrize("code", range(4), ids=FEATURE_MAPS)
def test_differences_in_fp64(code: int, den: bool) -> None:
    g = torch.Generator().manual_seed(code)

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return (x + 0.2 * x.sign()).requires_grad_()  # away from relu's corner

    k, v, q = leaf(2, 6, 2, 4), leaf(2, 6, 2, 3), leaf(2, 5, 4, 4)
    weights = [leaf(2, 4, 4), leaf(4, 4, 4)] if code == 0 else [None, None]
    dens = [leaf(2, 6, 2, 4), leaf(2, 5, 4, 4)] if den else [None, None]
    state = leaf(2, 2, 8 if code == 0 else 4, 4)
    state = torch.cat((state[..., :-1], state[..., -1:].abs() + 1), -1).detach().requires_grad_()
    n = torch.tensor([6, 2])
    assert torch.autograd.gradcheck(_State.apply, (k, v, weights[0], dens[0], code, n))
    if code == 3:  # denominators of any sign come near 0
        q, dens[1] = (None if x is None else x.detach().abs().requires_grad_() for x in (q, dens[1]))
    assert torch.autograd.gradcheck(_Readout.apply, (q, state, weights[1], dens[1], code))


def test_padding_gets_no_gradient_and_gives_none() -> None:
    problem = build(LinearCase("padding", dtype=F32, dim=8, dim_v=8, batch=2, kv_len=(40, 0)))
    inputs = {n: x.detach().clone().requires_grad_() for n, x in (("q", problem.q), ("k", problem.k), ("v", problem.v))}
    linear_attention(**{**problem.options, **inputs}).square().sum().backward()
    for name in "kv":
        gradient = inputs[name].grad
        assert gradient is not None and not gradient[0, 40:].any() and not gradient[1].any()
        assert gradient[0, :40].any() and torch.isfinite(gradient).all()
    assert inputs["q"].grad is not None and not inputs["q"].grad[1].any()


def test_rows_without_a_denominator_get_no_gradient() -> None:
    q, k, v = (torch.randn(1, 6, 1, 4).abs().requires_grad_() for _ in range(3))
    with torch.no_grad():
        q[0, 2] = -1
    linear_attention(q, k, v, feature_map="relu", eps=0.0).sum().backward()
    assert q.grad is not None and not q.grad[0, 2].any()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


def test_a_state_summed_over_shards_has_the_same_gradients() -> None:
    """What a sequence-parallel model does: states are added before the readout."""
    problem = build(LinearCase("shards", dtype=F32, dim=8, dim_v=8))
    twin, want = (gradients(reference.linear_attention, problem, dtype) for dtype in (F32, torch.float64))

    def sharded(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, **_: Any) -> Tensor:
        parts = [linear_attention_state(k[:, s], v[:, s], weight=k_weight) for s in (slice(0, 60), slice(60, None))]
        return linear_attention_readout(q, parts[0] + parts[1], weight=q_weight)

    as_exact_as(twin, gradients(sharded, problem, F32), want)


def test_compiled_training_step() -> None:
    problem = build(LinearCase("compiled", dtype=F32, dim=8, dim_v=8))
    inputs = leaves(problem, F32)

    def loss(**named: Any) -> Tensor:
        return linear_attention(**named).square().sum()

    want = torch.autograd.grad(loss(**inputs), list(inputs.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(**inputs), list(inputs.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_of_the_backward_does_not_grow_with_the_length() -> None:
    def most(length: int) -> int:
        """Floats of the largest tensor that the backward makes, results aside."""
        x = torch.randn(1, length, 1, 64)
        state = torch.rand(1, 1, 128, 65)
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
                return out

        with Watch():
            linear_attention_backward._readout_backward._init_fn(x, x, state, 0, None, None, 1e-15)
            linear_attention_backward._state_backward._init_fn(state, x, x, 0, None, None, None)
        return max(n for n in sizes if n not in (x.numel(),))

    short, long = (1 << 22) // 128, 3 * (1 << 22) // 128
    assert most(long) <= most(short)


def test_no_second_derivative() -> None:
    x = torch.randn(1, 5, 1, 8, requires_grad=True)
    (first,) = torch.autograd.grad(linear_attention(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()
