"""Attention over very many very short sequences, such as the frames at every place of a video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._no_gradient import refuse_tangents

__all__ = ["MAX_SHORT_KEYS", "short_attention"]

MAX_SHORT_KEYS = 64


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    kv_len: Tensor | None = None,
) -> Tensor:
    """Attention along dimension 1, for every batch item, place and head on its own. Differentiable in q, k and v.

    For temporal attention (Stable Video Diffusion, AnimateDiff, Latte): tokens ``[frames, places, heads, dim]`` are the
    view ``[1, frames, places, heads, dim]``, and no transposed copy is made of them. Scores and sums are fp32.

    Args:
        q: ``[B, Lq, S, H, D]``, or ``[B, Lq, H, D]`` for one place; float32, bfloat16 or float16, any strides,
            D at most 256. On a GPU, rows of a multiple of 8 elements that lie at multiples of 16 bytes are fast.
        k, v: ``[B, Lk, S, H, D]`` (or 4-D like q) of q's dtype, any strides, at most 64 keys.
        causal: row i reads the keys ``j <= i + Lk - Lq``: the last row reads all of them, so keys of earlier chunks
            go in front (ViD-GPT, arXiv 2406.10981; Ca2-VDM, arXiv 2411.16375). The ``is_causal`` of torch reads other
            keys where Lq and Lk differ.
        scale: factor on the scores, default ``D ** -0.5``.
        kv_len: int32 or int64 ``[B]``; keys ``j >= kv_len[b]`` are not read.

    Returns:
        q's shape and dtype, in q's own order of strides. A row that reads no key is 0. A key reaches no row that does
        not read it, whatever it holds. With one key, a row that reads it is that key's v, bit for bit.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, too many keys or columns; the message says which.
    """
    refuse_tangents("short_attention", q, k, v)
    if scale is None:
        scale = float(max(q.shape[-1], 1)) ** -0.5
    if q.dim() == 4 and k.dim() == 4 and v.dim() == 4:
        out = torch.ops.vdit_fast.short_attention(*(x.unsqueeze(2) for x in (q, k, v)), scale, causal, kv_len)
        return out.squeeze(2)
    return torch.ops.vdit_fast.short_attention(q, k, v, scale, causal, kv_len)


@torch.library.register_fake("vdit_fast::short_attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, kv_len: Tensor | None = None) -> Tensor:
    return torch.empty_like(q)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale, ctx.causal, kv_len = inputs
    ctx.save_for_backward(q, k, v, kv_len)


def _read_only(a: Tensor, x: Tensor, reads: Tensor) -> Tensor:
    """``a @ x``, where ``a`` is 0 outside of ``reads``: what is not read does not reach a row as 0 * NaN either."""
    finite = x.isfinite()
    odd = (reads.to(x.dtype) @ (~finite).to(x.dtype)) > 0
    return torch.where(odd, a @ x, a @ x.where(finite, 0))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The formula of the reference, differentiated: with P the weights, dS = P * (dP - rowsum(P * dP)).
    from vdit_fast.reference.short_attention import readable, weights

    q, k, v, kv_len = ctx.saved_tensors
    reads = readable(q, k, ctx.causal, kv_len)
    query, key, value, dout = (x.float().movedim(1, 3) for x in (q, k, v, grad))  # [B, S, H, L, D]
    p = weights(query, key, ctx.scale, reads)
    dp = (dout @ value.transpose(-1, -2)).masked_fill(~reads, 0)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).masked_fill(~reads, 0) * ctx.scale
    pairs = ((ds, key, reads), (ds.mT, query, reads.mT), (p.mT, dout, reads.mT))
    whole = kv_len is None and not ctx.causal
    found = (a @ x if whole else _read_only(a, x, of) for a, x, of in pairs)
    grads = (g.movedim(3, 1).to(x.dtype) for g, x in zip(found, (q, k, v), strict=True))
    return (*grads, None, None, None)


torch.library.register_autograd("vdit_fast::short_attention", _backward, setup_context=_setup)
