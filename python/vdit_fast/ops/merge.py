"""Merging partial attention results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._no_gradient import refuse_tangents


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention results over disjoint sets of keys into the result over their union.

    With LSE = logsumexp_i(lse_i), the result is out = Σ_i exp(lse_i − LSE) · out_i, computed in fp32
    (the reduction of FlashDecoding; see also FlashAttention-2, arXiv 2307.08691). Differentiable in everything.

    Args:
        outs: 1 to 32 tensors [batch, length, heads, dim] of one dtype (float32, float16, bfloat16), any strides.
        lses: as many float32 tensors [batch, heads, length], natural logarithms, any strides.

    Returns:
        out [batch, length, heads, dim] in the parts' dtype and lse float32 [batch, heads, length], both contiguous.
        A row that is empty (−inf) in every part gets out 0 and lse −inf. A part is not read where its own lse is −inf;
        other NaN reach the output.

    Raises:
        ValueError: there is no part.
        RuntimeError: shapes, dtypes or devices do not match, or there are more than 32 parts.
    """
    if not outs or not lses:  # without a tensor the dispatcher cannot pick a device
        raise ValueError(f"merge: {len(outs)} outs and {len(lses)} lses; pass at least one part")
    refuse_tangents("merge", *outs, *lses)
    return torch.ops.vdit_fast.merge(list(outs), list(lses))


@torch.library.register_fake("vdit_fast::merge")
def _fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _setup(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    # With w_i = exp(lse_i − LSE):  ∂LSE/∂lse_i = w_i,  ∂out/∂out_i = w_i,  ∂out/∂lse_i = w_i (out_i − out).
    # An empty row has LSE −inf, where lse_i − LSE is NaN; its result is constant, so its weights are 0 here.
    n = ctx.parts
    outs, lses = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n]
    out, lse = ctx.saved_tensors[2 * n :]
    grad, out = grad_out.float(), out.float()
    empty = lse == -torch.inf
    grad_outs, grad_lses = [], []
    for out_i, lse_i in zip(outs, lses, strict=True):
        weight = torch.where(empty, 0.0, torch.exp(lse_i - lse))
        grad_outs.append((weight.transpose(1, 2).unsqueeze(-1) * grad).to(out_i.dtype))
        read = out_i.float().masked_fill((lse_i == -torch.inf).transpose(1, 2).unsqueeze(-1), 0.0)
        pull = torch.linalg.vecdot(grad, read - out).transpose(1, 2)
        grad_lses.append(weight * (grad_lse + pull))
    return grad_outs, grad_lses


torch.library.register_autograd("vdit_fast::merge", _backward, setup_context=_setup)
