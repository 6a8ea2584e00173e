"""Attention under a plan, written as the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import AttentionPlan
from ..plan.stand_ins import NEVER


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None = None,
    *,
    scale: float | None = None,
    row_scale: Tensor | None = None,
    kv_len: Tensor | None = None,
    segments: Sequence[tuple[Tensor, Tensor]] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every query reads the keys its plan allows. The whole score matrix is formed.

    NaN or infinity in a key that some query reads reaches every row that has it in its product, so its positions may
    differ from the operator's, which never touches keys outside a tile's runs.

    Args:
        q: ``[B, Lq, H, D]``, any strides, a floating dtype. 16-bit inputs are computed in fp32, fp64 stays fp64.
        k, v: ``[B, Lk, Hkv, D]`` with ``H % Hkv == 0``.
        plan: AttentionPlan of shape ``(1 or B, 1 or H, Lq, Lk)``; None reads everything.
        scale: factor on the scores, default ``D ** -0.5``.
        row_scale: fp32 ``[B, H, Lq]``, factor on the output rows; the log-sum-exp stays as it is.
        kv_len: int32 or int64 ``[B]``; main keys with original index ``>= kv_len[b]`` are not read.
        segments: ``(k_s, v_s)`` pairs ``[1 or B, S, Hkv, D]`` that every query reads.
        return_lse: also return the natural log of the sum of exponentials, ``[B, H, Lq]``, fp32 (fp64 for fp64
            inputs).

    Returns:
        ``[B, Lq, H, D]`` in q's dtype, and the log-sum-exp if asked for. A row without keys gives 0 and -inf.
    """
    batch, lq, heads, dim = q.shape
    lk, kv_heads = k.shape[1], k.shape[2]
    _check(q, k, v, plan, row_scale, kv_len, segments)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale

    everything = torch.ones(1, 1, lq, lk, dtype=torch.bool, device=q.device)
    mask = (everything if plan is None else plan.to_mask()).expand(batch, heads, lq, lk)
    if kv_len is not None:
        mask = mask & (torch.arange(lk, device=q.device) < kv_len.view(batch, 1, 1, 1))
    keys, values = [k], [v]
    for k_s, v_s in segments or ():
        keys.append(k_s.expand(batch, -1, -1, -1))
        values.append(v_s.expand(batch, -1, -1, -1))
        mask = torch.cat((mask, mask.new_ones(batch, heads, lq, k_s.shape[1])), dim=-1)

    stand_ins = None if plan is None else plan.stand_ins
    if stand_ins is not None:
        mean_k, mean_v, log_count = stand_ins.means(k, v, kv_len)
        keys, values = ([x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in xs] for xs in (keys, values))
        groups = heads // mean_k.shape[2]
        keys.append(mean_k.to(dtype).repeat_interleave(groups, 2))
        values.append(mean_v.to(dtype).repeat_interleave(groups, 2))
        kv_heads = heads
        extra = torch.zeros(batch, heads, mask.shape[-1], dtype=dtype, device=q.device)
        bias = torch.cat((extra, log_count.to(dtype).repeat_interleave(groups, 1)), -1)[:, :, None]
        reads = stand_ins.plan.to_mask().expand(batch, heads, lq, mean_k.shape[1])
        reads = reads & (bias[..., mask.shape[-1] :] > NEVER / 2)  # a block without tokens has no stand-in
        mask = torch.cat((mask, reads), -1)

    queries = q.to(dtype).transpose(1, 2)  # [B, H, Lq, D]
    # [B, H, all keys, D]; a key that nobody reads must not matter even if it holds NaN
    unread = ~mask.any(2)[..., None]
    key, value = (
        torch.cat(parts, 1).to(dtype).transpose(1, 2).repeat_interleave(heads // kv_heads, 1).masked_fill(unread, 0)
        for parts in (keys, values)
    )

    scores = queries @ key.transpose(-1, -2) * scale
    if stand_ins is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = (scores == -torch.inf).all(-1)  # no key, or only keys of score -inf
    out = (weights @ value) / total.masked_fill(empty[..., None], 1)
    if row_scale is not None:
        out = out * row_scale.to(dtype)[..., None]
    result = out.transpose(1, 2).to(q.dtype)
    if not return_lse:
        return result
    lse = total.squeeze(-1).masked_fill(empty, 1).log() + top.squeeze(-1)
    return result, lse.masked_fill(empty, -torch.inf)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None,
    row_scale: Tensor | None,
    kv_len: Tensor | None,
    segments: Sequence[tuple[Tensor, Tensor]] | None,
) -> None:
    batch, lq, heads, dim = q.shape
    lk, kv_heads = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k and v must be [{batch}, Lk, Hkv, {dim}] like q {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
        )
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, not a multiple of the {kv_heads} heads of k and v")
    lengths = tuple(pair[0].shape[1] for pair in segments or ())
    for k_s, v_s in segments or ():
        if k_s.shape != v_s.shape or k_s.shape[0] not in (1, batch) or k_s.shape[2:] != k.shape[2:]:
            raise ValueError(
                f"a segment must be [1 or {batch}, S, {kv_heads}, {dim}] for keys and values, got "
                f"{list(k_s.shape)} and {list(v_s.shape)}"
            )
    if plan is not None:
        if plan.batch not in (1, batch) or plan.heads not in (1, heads) or (plan.lq, plan.lk) != (lq, lk):
            raise ValueError(
                f"plan is for (batch, heads, lq, lk) = {plan.shape}, the tensors are {(batch, heads, lq, lk)}; "
                "build it for these tensors"
            )
        if plan.segments and plan.segments != lengths:
            raise ValueError(f"plan needs segments of lengths {plan.segments}, the call brings {lengths}")
    if row_scale is not None and row_scale.shape != (batch, heads, lq):
        raise ValueError(f"row_scale must be [{batch}, {heads}, {lq}], got {list(row_scale.shape)}")
    if kv_len is not None and kv_len.shape != (batch,):
        raise ValueError(f"kv_len must be [{batch}], got {list(kv_len.shape)}")
