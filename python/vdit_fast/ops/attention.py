"""Plan-driven attention: the public function, its shape function for tracing, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._no_gradient import refuse_tangents
from .stand_ins import add_stand_ins

if TYPE_CHECKING:
    from vdit_fast.plan import AttentionPlan

Segments = Sequence[tuple[Tensor, Tensor]]
_PLAN_ARGS = 6  # tiles, run_ptr, runs, mask_bits, q_order, kv_order
_NO_PLAN = (None,) * _PLAN_ARGS


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    kv_len: Tensor | None = None,
    segments: Segments | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys that the plan gives it.

    Scores, softmax and sums are fp32 whatever the dtype. Differentiable in q, k, v, row_scale and the segments.

    Args:
        q: ``[B, Lq, H, D]``, float32, bfloat16 or float16, any strides, D at most 256.
        k, v: ``[B, Lk, Hkv, D]`` of the same dtype; H is a multiple of Hkv (grouped-query attention).
        plan: which keys each query tile reads; None reads all of them.
        scale: multiplies the scores; default ``D ** -0.5``.
        row_scale: float32 ``[B, H, Lq]``, multiplies the rows of the output and not the LSE
            (the rho of Re-ttention, arXiv 2505.22918).
        kv_len: int32 or int64 ``[B]``; main keys whose original index is at or above it are never read.
        segments: ``(k_s, v_s)`` pairs ``[B or 1, S, Hkv, D]`` of further keys that every query reads (memory,
            reference or text tokens).
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out ``[B, Lq, H, D]`` in q's dtype, and with ``return_lse`` the natural logarithm float32 ``[B, H, Lq]``.
        A row that may read no key is an empty row: out 0, LSE -inf.

    Raises:
        RuntimeError: shapes, dtypes, devices, or the plan's batch or heads do not fit, or its lists are damaged.
        ValueError: the plan is for other lengths, or declares segments that the call does not bring.
    """
    segments = list(segments or ())
    refuse_tangents("attention", q, k, v, row_scale, *(t for pair in segments for t in pair))
    if plan is None:
        plan_args: tuple[Tensor | None, ...] = _NO_PLAN
        plan_batch, plan_heads = 1, 1
    else:
        _check_plan_shape(plan, q, k, segments)
        plan_args, plan_batch, plan_heads = plan.op_args(), plan.batch, plan.heads
    differentiable_scale = row_scale is not None and torch.is_grad_enabled() and row_scale.requires_grad
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    stand_ins = None if plan is None else plan.stand_ins
    scale_after = row_scale is not None and (differentiable_scale or stand_ins is not None)
    if scale_after and row_scale is not None and row_scale.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise RuntimeError(
            f"attention: row_scale is {list(row_scale.shape)}; expected [batch, heads, queries] = "
            f"[{q.shape[0]}, {q.shape[2]}, {q.shape[1]}]"
        )
    out, lse = torch.ops.vdit_fast.attention(
        q,
        k,
        v,
        *plan_args,
        plan_batch,
        plan_heads,
        scale,
        None if scale_after else row_scale,
        kv_len,
        [s[0] for s in segments],
        [s[1] for s in segments],
    )
    if stand_ins is not None:
        out, lse = add_stand_ins(out, lse, attention, stand_ins, q, k, v, scale, kv_len)
    if scale_after and row_scale is not None:
        factor = row_scale.masked_fill(lse == -torch.inf, 0.0)  # an empty row stays 0 whatever its factor
        out = (out.float() * factor.transpose(1, 2).unsqueeze(-1)).to(out.dtype)
    return (out, lse) if return_lse else out


def _check_plan_shape(plan: AttentionPlan, q: Tensor, k: Tensor, segments: Segments) -> None:
    if q.dim() == 4 and k.dim() == 4 and (plan.lq != q.shape[1] or plan.lk != k.shape[1]):
        raise ValueError(
            f"plan is for {plan.lq} queries and {plan.lk} keys, but q has {q.shape[1]} and k has {k.shape[1]}; "
            "build the plan for these lengths"
        )
    if plan.segments and tuple(s[0].shape[1] for s in segments) != tuple(plan.segments):
        raise ValueError(
            f"plan.segments declares lengths {tuple(plan.segments)}, but the call brings "
            f"{tuple(s[0].shape[1] for s in segments)}; pass segments=[(k, v), ...] of these lengths"
        )


@torch.library.register_fake("vdit_fast::attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, lq, heads, dim = q.shape
    return q.new_empty((batch, lq, heads, dim)), q.new_empty((batch, heads, lq), dtype=torch.float32)


@torch.library.register_fake("vdit_fast::attention_backward")
def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    segment_k, segment_v = rest[-2:]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        [s.new_empty(s.shape) for s in segment_k],
        [s.new_empty(s.shape) for s in segment_v],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v = inputs[:3]
    plan_args = inputs[3 : 3 + _PLAN_ARGS]
    ctx.plan_batch, ctx.plan_heads, ctx.scale, row_scale, kv_len, segment_k, segment_v = inputs[3 + _PLAN_ARGS :]
    ctx.segments = len(segment_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *plan_args, row_scale, kv_len, *output, *segment_k, *segment_v)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *rest = ctx.saved_tensors
    plan_args, (row_scale, kv_len, out, lse) = rest[:_PLAN_ARGS], rest[_PLAN_ARGS : _PLAN_ARGS + 4]
    tail = rest[_PLAN_ARGS + 4 :]
    segment_k, segment_v = list(tail[: ctx.segments]), list(tail[ctx.segments :])
    dq, dk, dv, dsk, dsv = torch.ops.vdit_fast.attention_backward(
        torch.zeros_like(out) if dout is None else dout,
        None if dlse is None else dlse.contiguous(),
        out,
        lse,
        q,
        k,
        v,
        *plan_args,
        ctx.plan_batch,
        ctx.plan_heads,
        ctx.scale,
        row_scale,
        kv_len,
        segment_k,
        segment_v,
    )
    return (dq, dk, dv, *_NO_PLAN, None, None, None, None, None, dsk, dsv)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "attention has no second derivative; compute the first one without create_graph, or use "
        "vdit_fast.reference.attention"
    )


torch.library.register_autograd("vdit_fast::attention", _backward, setup_context=_setup)
torch.library.register_autograd("vdit_fast::attention_backward", _no_second_derivative)
