"""attention as an operator: opcheck, tracing, and what bad input gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vdit_fast
from vdit_fast.plan import AttentionPlan


def tensors(batch: int = 1, lq: int = 70, lk: int = 70, grad: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, n, 2, 64, requires_grad=grad) for n in (lq, lk, lk)]


def block_plan(heads: int = 2, length: int = 70) -> AttentionPlan:
    torch.manual_seed(1)
    n = -(-length // 32)
    return AttentionPlan.from_block_mask(torch.rand(heads, n, n) < 0.5, 32, 32, lq=length, lk=length)


@pytest.mark.parametrize("with_plan", [False, True])
def test_opcheck(with_plan):
    plan = block_plan().op_args() if with_plan else (None,) * 6
    q, k, v = tensors(grad=True)
    segment = torch.randn(1, 3, 2, 64, requires_grad=True)
    args = (q, k, v, *plan, 1, 2 if with_plan else 1, 0.1, None, torch.tensor([60]), [segment], [segment.detach() * 2])
    torch.library.opcheck(torch.ops.vdit_fast.attention, args)
    with torch.no_grad():
        out, lse = torch.ops.vdit_fast.attention(*args)
        fixed = [x.detach() if isinstance(x, torch.Tensor) else x for x in args[:-2]]
        fixed += [[s.detach() for s in segments] for segments in args[-2:]]
        torch.library.opcheck(torch.ops.vdit_fast.attention_backward, (out * 0.5, lse * 0.1, out, lse, *fixed))


def test_second_derivatives_are_refused_not_zero():
    q, k, v = tensors(grad=True)
    (first,) = torch.autograd.grad(vdit_fast.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.square().sum().backward()


def test_row_scale_with_a_gradient_is_checked_and_leaves_empty_rows_alone():
    q, k, v = tensors()
    with pytest.raises(RuntimeError, match="row_scale"):
        vdit_fast.attention(q, k, v, row_scale=torch.ones(1, 1, 1, requires_grad=True))
    rho = torch.full((1, 2, 70), torch.inf, requires_grad=True)
    assert not vdit_fast.attention(q, k, v, kv_len=torch.tensor([0]), row_scale=rho).any()


def test_fullgraph_compile_with_dynamic_shapes():
    plans = {n: block_plan(length=n) for n in (70, 99)}
    compiled = torch.compile(
        lambda q, k, v, plan: vdit_fast.attention(q * 2, k, v, plan).relu(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n, plan in plans.items():
        q, k, v = tensors(lq=n, lk=n)
        assert torch.equal(compiled(q, k, v, plan), vdit_fast.attention(q * 2, k, v, plan).relu())
    q, k, v = tensors(grad=True)
    got = torch.autograd.grad(compiled(q, k, v, plans[70]).sum(), (q, k, v))
    want = torch.autograd.grad(vdit_fast.attention(q * 2, k, v, plans[70]).relu().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_inductor_compiles_it():
    q, k, v = tensors()
    compiled = torch.compile(lambda q, k, v: vdit_fast.attention(q + 1, k, v, return_lse=True), fullgraph=True)
    for a, b in zip(compiled(q, k, v), vdit_fast.attention(q + 1, k, v, return_lse=True), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


BAD_TENSORS = {
    "float64": (lambda q, k, v: (q.double(), k.double(), v.double()), "float64.*convert"),
    "mixed dtype": (lambda q, k, v: (q, k.half(), v), "k is float16 but q is float32"),
    "3-D": (lambda q, k, v: (q[0], k, v), r"q has shape \[70, 2, 64\]"),
    "batch": (lambda q, k, v: (q, k.repeat(2, 1, 1, 1), v), "batch and head dim must agree"),
    "k and v lengths": (lambda q, k, v: (q, k, v[:, :-1]), r"k has shape .* but v has"),
    "heads": (lambda q, k, v: (q[:, :, :1], k, v), "not a multiple"),
    "head dim": (lambda q, k, v: tuple(t.repeat(1, 1, 1, 5) for t in (q, k, v)), "head dim is 320"),
    "no head dim": (lambda q, k, v: tuple(t[..., :0] for t in (q, k, v)), "head dim is 0"),
    "no kv heads": (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "not a multiple"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case):
    change, message = BAD_TENSORS[case]
    with pytest.raises(RuntimeError, match=message):
        vdit_fast.attention(*change(*tensors()))


BAD_OPTIONS = {
    "nan scale": ({"scale": float("nan")}, "scale is nan"),
    "inf scale": ({"scale": float("inf")}, "scale is inf"),
    "kv_len too long": ({"kv_len": torch.tensor([71])}, r"kv_len\[0\] is 71; expected 0 to 70"),
    "kv_len negative": ({"kv_len": torch.tensor([-1])}, r"kv_len\[0\] is -1"),
    "kv_len shape": ({"kv_len": torch.tensor([1, 2])}, "kv_len is int64"),
    "kv_len dtype": ({"kv_len": torch.tensor([1.0])}, "kv_len is float32"),
    "row_scale shape": ({"row_scale": torch.ones(1, 70, 2)}, "row_scale"),
    "row_scale dtype": ({"row_scale": torch.ones(1, 2, 70).half()}, "row_scale is float16"),
    "segment heads": ({"segments": [(torch.randn(1, 3, 1, 64),) * 2]}, r"segments\[0\].k"),
    "segment values": ({"segments": [(torch.randn(1, 3, 2, 64), torch.randn(1, 4, 2, 64))]}, r"segments\[0\].v"),
    "segment batch": ({"segments": [(torch.randn(3, 3, 2, 64),) * 2]}, r"segments\[0\].k"),
    "plan for other lengths": ({"plan": AttentionPlan.dense(64, 70)}, "plan is for 64 queries"),
    "plan for other heads": ({"plan": AttentionPlan.dense(70, 70, heads=3)}, "3 heads"),
    "plan for another batch": ({"plan": AttentionPlan.dense(70, 70, batch=2)}, "batch 2"),
    "missing segments": ({"plan": AttentionPlan.dense(70, 70).with_segments([4])}, r"declares lengths \(4,\)"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises((RuntimeError, ValueError), match=message):
        vdit_fast.attention(*tensors(), **options)


def test_damaged_plans_are_refused_not_followed():
    """Every field the kernel indexes by, driven out of range at random: an error, never a crash or a wrong answer."""
    q, k, v = tensors()
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(70, generator=g).int().view(1, 1, 70)
    plan = AttentionPlan.from_mask(torch.rand(2, 70, 70, generator=g) < 0.5, block=(32, 32))
    plan = replace(plan, q_order=order, kv_order=order)
    good = vdit_fast.attention(q, k, v, plan)
    refused = 0
    for _ in range(300):
        name = ["tiles", "run_ptr", "runs", "q_order", "kv_order"][int(torch.randint(5, (), generator=g))]
        field = getattr(plan, name).clone()
        flat = field.view(-1)
        at = int(torch.randint(flat.numel(), (), generator=g))
        flat[at] = [-(2**31), -7, -1, 71, 10**6, 2**31 - 1][int(torch.randint(6, (), generator=g))]
        damaged = replace(plan, **{name: field})
        try:
            out = vdit_fast.attention(q, k, v, damaged)
        except RuntimeError as error:
            assert "plan" in str(error)
            refused += 1
        else:  # what is still a plan is executed as one
            assert torch.allclose(out, vdit_fast.reference.attention(q, k, v, damaged), atol=1e-5)
    assert refused > 250
    assert torch.equal(good, vdit_fast.attention(q, k, v, plan))
    with pytest.raises(RuntimeError, match="int32"):
        vdit_fast.attention(q, k, v, replace(plan, runs=plan.runs.long()))
    with pytest.raises(RuntimeError, match="run_ptr"):
        vdit_fast.attention(q, k, v, replace(plan, run_ptr=plan.run_ptr[:-1]))


def test_empty_tensors():
    assert vdit_fast.attention(*tensors(lq=0)).shape == (1, 0, 2, 64)
    out, lse = vdit_fast.attention(*tensors(lk=0), return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    assert vdit_fast.attention(*tensors(batch=0)).shape == (0, 70, 2, 64)
    q, k, v = tensors(lk=0, grad=True)
    assert all(not g.any() for g in torch.autograd.grad(vdit_fast.attention(q, k, v).sum(), (q, k, v)))
