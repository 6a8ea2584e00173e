"""Self-attention plus a gated attention to text, each with a softmax of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from .attention import attention

if TYPE_CHECKING:
    from vdit_fast.plan import AttentionPlan


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    gate: Tensor,
    plan: AttentionPlan | None = None,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    text_len: Tensor | None = None,
) -> Tensor:
    """attention(q, k, v) + tanh(gate_h) * attention(q, k_text, v_text): the block of Flag-DiT and Next-DiT.

    (Lumina-T2X, arXiv 2405.05945; Lumina-Next, arXiv 2406.18583.) Training starts at gate 0, where the text has no
    effect at all. The gate multiplies the text's rows in fp32 inside the attention kernel. Differentiable in all
    tensors.

    Args:
        q: [B, N, H, D] after norm and RoPE, for both parts.
        k, v: [B, N, Hkv, D], k after norm and RoPE; H is a multiple of Hkv (Next-DiT: 32 and 8).
        k_text, v_text: [B, T, Hkv, D], k_text after its norm, without positions.
        gate: [H], before tanh.
        plan: which video keys each query tile reads; None reads all. The text is always read in full.
        scale: of the self-attention's scores, such as ``positions.proportional_scale``; the text's is D ** -0.5.
        kv_len, text_len: int [B], valid keys of either part, None when all are. An item without valid text gets none.

    Returns:
        [B, N, H, D] in q's dtype.

    Raises:
        ValueError: the gate is not one number per head.
        RuntimeError, ValueError: what ``attention`` raises for either part.
    """
    if q.dim() == 4 and gate.shape != (q.shape[2],):
        raise ValueError(f"gate is {list(gate.shape)}; expected one number for each of q's {q.shape[2]} heads")
    own = cast(Tensor, attention(q, k, v, plan, scale=scale, kv_len=kv_len))
    rows = gate.float().tanh().view(1, -1, 1).expand(q.shape[0], -1, q.shape[1]).contiguous()
    return own + cast(Tensor, attention(q, k_text, v_text, row_scale=rows, kv_len=text_len))
