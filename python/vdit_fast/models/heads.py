"""One attention call of a served layer as data, who may stand around it, and the kernel call at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from vdit_fast.models.kernels import dense_attention, over_plan
from vdit_fast.ops.attention import attention
from vdit_fast.ops.merge import merge
from vdit_fast.ops.short_attention import short_attention
from vdit_fast.planners.base import Decision

if TYPE_CHECKING:
    from vdit_fast.context import HeadShard
    from vdit_fast.models.forward import Forward
    from vdit_fast.models.session import Session
    from vdit_fast.plan import AttentionPlan

__all__ = ["HEADS", "AroundHeads", "HeadsCall", "enter_heads", "execute"]

HEADS = ("sequence", "streaming", "regions", "segments")
"""Who may stand around attention, outermost first: sequence parallelism hands the others whole sequences, a K/V cache
adds the past to the keys, regions say who reads whom, segments are further keys outside of the sequence."""

Segments = list[tuple[Tensor, Tensor]]


@dataclass
class HeadsCall:
    """One attention call of a served layer; whoever stands around it may exchange what it holds before going on."""

    session: Session
    layer: int
    """Number among the served layers."""
    q: Tensor
    """[B, Lq, H, D] after norm and RoPE, the joint sequence in the model's order."""
    k: Tensor
    """[B, Lk, Hkv, D]."""
    v: Tensor
    kv_len: Tensor | None = None
    """int [B]: number of valid keys; None when all are."""
    anchor: Tensor | None = None
    """A tensor that the transformer makes anew in every forward."""
    scale: float | None = None
    """None is D ** -0.5."""
    mask: Tensor | None = None
    """bool [1, 1, N, N] of a transformer whose geometry has a frame block."""
    plan: AttentionPlan | None = None
    """Which keys are read, where that is decided already; planners are not asked then."""
    planned: str = ""
    """Why, for the report."""
    whole: bool = False
    """Whether the plan leaves no key out, and says only where they lie."""
    segments: Segments = field(default_factory=list)
    """Further keys and values [B or 1, S, Hkv, D] that every query reads; of all key heads of the model, or of the
    call's."""
    heads: HeadShard | None = None
    """Which of the layer's heads q, k and v have, None when all."""

    def cut_segments(self) -> None:
        """Leave the call's own key heads in segments that have all of the model's."""
        shard = self.heads
        if shard is not None and shard.kv_total != self.k.shape[2]:
            self.segments = [
                (shard.own_keys(k), shard.own_keys(v)) if k.shape[2] == shard.kv_total else (k, v)
                for k, v in self.segments
            ]

    @property
    def forward(self) -> Forward | None:
        """The transformer's forward that it belongs to."""
        return self.session.forward if self.anchor is None else self.session.forward_of(self.anchor)

    @property
    def recorded(self) -> bool:
        """Whether gradients are recorded."""
        return torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad or self.v.requires_grad)

    def dense(self) -> Tensor:
        """The call by torch, as the stock model computes it."""
        return dense_attention(self.q, self.k, self.v, self.kv_len, self.scale, self.mask, self.segments)

    def over(self, plan: AttentionPlan | None) -> Tensor:
        """The call over another plan."""
        if self.mask is None:
            return over_plan(self.q, self.k, self.v, self.kv_len, self.scale, plan, self.segments)
        mask = self.mask if plan is None else self.mask & plan.to_mask()
        return dense_attention(self.q, self.k, self.v, self.kv_len, self.scale, mask, self.segments)


class AroundHeads(Protocol):
    """Stands around the attention calls of one transformer, inside of its processors."""

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        """[B, Lq, H, D] for the q that the call came with; ``proceed()`` computes the call as it is then."""
        ...

    def fresh(self) -> AroundHeads | None:
        """The same settings without records, for a copied model; None: it does not stand in a copy."""
        ...


def enter_heads(call: HeadsCall, innermost: Callable[[HeadsCall], Tensor]) -> Tensor:
    """Run a call through everybody who stands around it."""
    present = call.session.around_heads
    around = [present[who] for who in HEADS if who in present]

    def enter(depth: int) -> Tensor:
        if depth < len(around):
            return around[depth](call, lambda: enter(depth + 1))
        call.cut_segments()
        return innermost(call)

    return enter(0)


def execute(decision: Decision, call: HeadsCall, short: bool) -> Tensor:
    """The attention call that a planner decided on; ``short`` for a layer of short sequences that none sees."""
    if short:
        return short_attention(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale)
    if call.segments and (decision.row_scale is not None or decision.observe is not None):
        return _beside_segments(decision, call)
    options: dict[str, Any] = {
        "row_scale": decision.row_scale,
        "kv_len": call.kv_len,
        "scale": call.scale,
        "segments": call.segments,
    }
    if decision.observe is None:
        out = cast(Tensor, attention(call.q, call.k, call.v, decision.plan, **options))
    else:
        out, lse = attention(call.q, call.k, call.v, decision.plan, **options, return_lse=True)
        with torch.no_grad():
            decision.observe(out.detach(), lse.detach())
    return out if decision.residual is None else out + decision.residual


TINY = 1e-37
"""Least share of a row's mass that a method's factor stands for."""


def _beside_segments(decision: Decision, call: HeadsCall) -> Tensor:
    """The call of a method that looks at the softmax over the sequence, or makes up for what its plan leaves out of it:
    further keys are no part of that, and are merged by LSE behind it."""
    q, k, v, scale = call.q, call.k, call.v, call.scale
    out, lse = cast(
        tuple[Tensor, Tensor],
        attention(
            q, k, v, decision.plan, row_scale=decision.row_scale, kv_len=call.kv_len, scale=scale, return_lse=True
        ),
    )
    if decision.observe is not None:
        with torch.no_grad():
            decision.observe(out.detach(), lse.detach())
    after = decision.residual
    if decision.row_scale is not None:
        # rho is the mass of what the plan reads over that of all, and the residual the share of the others
        lse = lse - decision.row_scale.clamp(min=TINY).log()
        out, after = (out if after is None else out + after), None
    (first_k, first_v), *rest = call.segments
    first_k, first_v = (x.expand(q.shape[0], -1, -1, -1) for x in (first_k, first_v))
    others = cast(tuple[Tensor, Tensor], attention(q, first_k, first_v, scale=scale, segments=rest, return_lse=True))
    out = merge([out, others[0]], [lse, others[1]])[0]
    return out if after is None else out + after
