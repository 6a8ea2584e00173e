"""Gradients of linear attention's two operators: fp32 matrix products over chunks of the sequence.

Time grows linearly with the length, and besides the results memory does not grow with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["FEATURE_MAPS"]

FEATURE_MAPS = ("hedgehog", "relu", "elu", "identity")
_HEDGEHOG, _RELU, _ELU, _ = range(4)
_CHUNK_FLOATS = 1 << 22  # features of a chunk, over all heads


class _Features:
    """Features of a chunk ``x`` [B, H, n, D], and the way back from their gradients."""

    def __init__(self, x: Tensor, feature_map: int, weight: Tensor | None) -> None:
        self._x, self._map, self._weight = x, feature_map, weight
        if feature_map == _HEDGEHOG:
            y = x if weight is None else x @ weight
            self.phi = torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
        elif feature_map == _RELU:
            self.phi = x.relu()
        else:
            self.phi = torch.where(x > 0, x + 1, x.exp()) if feature_map == _ELU else x

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of x and of the weight [H, D, D], from those of the features."""
        if self._map != _HEDGEHOG:
            if self._map == _RELU:
                grad = grad.masked_fill(self._x <= 0, 0)
            elif self._map == _ELU:
                grad = torch.where(self._x > 0, grad, grad * self.phi)
            return grad, None
        product = self.phi * grad
        dim = self._x.shape[-1]
        halves = ((product[..., :dim], self.phi[..., :dim]), (product[..., dim:], self.phi[..., dim:]))
        plus, minus = (p - s * p.sum(-1, keepdim=True) for p, s in halves)
        dy = plus - minus
        if self._weight is None:
            return dy, None
        return dy @ self._weight.mT, (self._x.mT @ dy).sum(0)


def _widened(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.to(dtype)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor, features: int) -> Iterator[slice]:
    batch, length, heads, _ = x.shape
    step = max(64, _CHUNK_FLOATS // max(1, batch * heads * features))
    for first in range(0, length, step):
        yield slice(first, min(length, first + step))


def _sum_weight(total: Tensor, weight: Tensor) -> Tensor:
    return (total.sum(0) if weight.dim() == 2 else total).to(weight.dtype)


def _full_precision(fn: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """``fn`` outside of autocast, whose 16-bit products are not what fp32 gradients promise."""

    @functools.wraps(fn)
    def run(grad: Tensor, *rest: Any) -> list[Tensor]:
        with torch.autocast(grad.device.type, enabled=False):
            return fn(grad, *rest)

    return run


@torch.library.custom_op("vdit_fast::linear_attention_state_backward", mutates_args=())
@_full_precision
def _state_backward(
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: int,
    weight: Tensor | None,
    k_den: Tensor | None,
    kv_len: Tensor | None,
) -> list[Tensor]:
    """Gradients of k, v, and where they are given of the weight and k_den, in this order."""
    dtype = _work_dtype(k)
    wide = _widened(weight, dtype)
    grad_v, grad_z = grad[..., :-1].to(dtype), grad[..., -1].to(dtype)[:, :, None]  # [B, H, F, Dv], [B, H, 1, F]
    inputs = [k, v] if k_den is None else [k, v, k_den]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    dweight = None if weight is None else grad.new_zeros((k.shape[2], *weight.shape[-2:]), dtype=dtype)

    for rows in _chunks(k, grad.shape[2]):
        chunk = [x[:, rows].transpose(1, 2).to(dtype) for x in inputs]
        dead = None
        if kv_len is not None:
            dead = torch.arange(rows.start, rows.stop, device=k.device) >= kv_len[:, None]
            dead = dead[:, None, :, None]
            chunk = [x.masked_fill(dead, 0) for x in chunk]
        found = _Features(chunk[0], feature_map, wide)
        dphi = chunk[1] @ grad_v.mT
        results = [dphi if k_den is not None else dphi + grad_z, found.phi @ grad_v]
        sources = [found]
        if k_den is not None:
            sources.append(_Features(chunk[2], feature_map, wide))
            results.append(grad_z.expand_as(dphi))
        if dead is not None:
            results = [r.masked_fill(dead, 0) for r in results]
        for at, source in zip((0, 2), sources, strict=False):
            results[at], dw = source.backward(results[at])
            if dweight is not None and dw is not None:
                dweight += dw
        for out, result in zip(grads, results, strict=True):
            out[:, rows] = result.transpose(1, 2)
    if weight is not None and dweight is not None:
        grads.insert(2, _sum_weight(dweight, weight))
    return grads


@_state_backward.register_fake
def _fake_state_backward(
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: int,
    weight: Tensor | None,
    k_den: Tensor | None,
    kv_len: Tensor | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (k, v, weight, k_den) if x is not None]


@torch.library.custom_op("vdit_fast::linear_attention_readout_backward", mutates_args=())
@_full_precision
def _readout_backward(
    grad: Tensor,
    q: Tensor,
    state: Tensor,
    feature_map: int,
    weight: Tensor | None,
    q_den: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Gradients of q, the state, and where they are given of the weight and q_den, in this order."""
    dtype, (batch, kv_heads, features, width) = _work_dtype(q), state.shape
    wide = _widened(weight, dtype)
    values, sums = state[..., :-1].to(dtype), state[..., -1:].to(dtype)  # [B, Hkv, F, Dv], [B, Hkv, F, 1]
    inputs = [q] if q_den is None else [q, q_den]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    dstate = torch.zeros((batch, kv_heads, features, width), dtype=dtype, device=q.device)
    dweight = None if weight is None else state.new_zeros((q.shape[2], *weight.shape[-2:]), dtype=dtype)

    def grouped(x: Tensor) -> Tensor:  # [B, H, n, .] to [B, Hkv, H / Hkv * n, .]
        return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)

    for rows in _chunks(q, features):
        chunk = [x[:, rows].transpose(1, 2).to(dtype) for x in (grad, *inputs)]
        sources = [_Features(x, feature_map, wide) for x in chunk[1:]]
        phi = [grouped(s.phi) for s in sources]
        total = phi[-1] @ sums + eps
        factor = torch.where(total == 0, 0, 1 / total)
        dvalue = grouped(chunk[0]) * factor
        dtotal = -(dvalue * (phi[0] @ values)).sum(-1, keepdim=True) * factor
        dstate[..., :-1] += phi[0].mT @ dvalue
        dstate[..., -1:] += phi[-1].mT @ dtotal
        dphi = [dvalue @ values.mT, dtotal @ sums.mT]
        if q_den is None:
            dphi = [dphi[0] + dphi[1]]
        for out, source, d in zip(grads, sources, dphi, strict=True):
            d = d.unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
            dx, dw = source.backward(d)
            out[:, rows] = dx.transpose(1, 2)
            if dweight is not None and dw is not None:
                dweight += dw
    found = [grads[0], dstate.to(state.dtype)]
    if weight is not None and dweight is not None:
        found.append(_sum_weight(dweight, weight))
    return found + grads[1:]


@_readout_backward.register_fake
def _fake_readout_backward(
    grad: Tensor,
    q: Tensor,
    state: Tensor,
    feature_map: int,
    weight: Tensor | None,
    q_den: Tensor | None,
    eps: float,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, state, weight, q_den) if x is not None]


def _optional(grads: list[Tensor], weight: Tensor | None, den: Tensor | None) -> list[Tensor | None]:
    rest = iter(grads)
    return [None if x is None else next(rest) for x in (weight, den)]


def _setup_state(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, v, ctx.feature_map, *others = inputs
    ctx.save_for_backward(k, v, *others)


def _state_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    k, v, weight, k_den, kv_len = ctx.saved_tensors
    dk, dv, *rest = torch.ops.vdit_fast.linear_attention_state_backward(
        grad, k, v, ctx.feature_map, weight, k_den, kv_len
    )
    return (dk, dv, None, *_optional(rest, weight, k_den), None)


def _setup_readout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, state, ctx.feature_map, weight, q_den, ctx.eps = inputs
    ctx.save_for_backward(q, state, weight, q_den)


def _readout_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, state, weight, q_den = ctx.saved_tensors
    dq, dstate, *rest = torch.ops.vdit_fast.linear_attention_readout_backward(
        grad, q, state, ctx.feature_map, weight, q_den, ctx.eps
    )
    return (dq, dstate, None, *_optional(rest, weight, q_den), None)


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError(
        "linear_attention has no second derivative; compute the first one without create_graph, or use "
        "vdit_fast.reference.linear_attention"
    )


torch.library.register_autograd("vdit_fast::linear_attention_state", _state_gradients, setup_context=_setup_state)
torch.library.register_autograd("vdit_fast::linear_attention_readout", _readout_gradients, setup_context=_setup_readout)
torch.library.register_autograd("vdit_fast::linear_attention_state_backward", _no_second_derivative)
torch.library.register_autograd("vdit_fast::linear_attention_readout_backward", _no_second_derivative)
