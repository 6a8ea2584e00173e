"""Attention that is causal over frames, with context rows that every frame reads, in models that have no such mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdit_fast.caching.checks import choice, count
from vdit_fast.models.callables import check_handle
from vdit_fast.models.heads import AroundHeads, HeadsCall
from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.memo import remembered

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["CausalFrames", "causal_frames"]

WHO = "streaming"


@dataclass(frozen=True)
class CausalFrames:
    """A frame reads the context, itself and earlier frames (AR-Diffusion, arXiv 2503.07418).

    Attributes:
        block: frames that read each other in full; 1 is frame by frame.
        context_reads: what context rows (text in the sequence) read: ``"all"``, as the released configuration of
            AR-Diffusion has it, or ``"context"``, themselves only.
    """

    block: int = 1
    context_reads: str = "all"

    def __post_init__(self) -> None:
        count("block", self.block, 1)
        choice("context_reads", self.context_reads, ("all", "context"))

    @property
    def context_cacheable(self) -> bool:
        """Whether the context's keys and values stay the same while the video changes, so that they may be kept from
        step to step. Rows that read the video change with it from the second layer on. (They must not depend on the
        timestep either, which is the model's affair: AR-Diffusion's context is not modulated.)"""
        return self.context_reads == "context"

    def plan(
        self,
        grid: tuple[int, int, int],
        context: int = 0,
        *,
        context_first: bool = True,
        device: torch.device | str | None = None,
    ) -> AttentionPlan:
        """The plan for ``context`` rows before (or behind) the frames of a token grid."""
        count("context", context, 0)
        frames, height, width = grid
        sizes = [min(self.block, frames - first) * height * width for first in range(0, frames, self.block)]
        plan = AttentionPlan.block_causal([context, *sizes], full=int(self.context_reads == "all"), device=device)
        if context_first or context == 0:
            return plan
        order = torch.arange(plan.lq, dtype=torch.int32, device=plan.device).roll(context)[None, None]
        return replace(plan, q_order=order, kv_order=order)


class _CausalHeads(AroundHeads):
    def __init__(self, layout: CausalFrames) -> None:
        self.layout = layout

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        ledger = call.session.layers[call.layer]
        if ledger.always_dense is not None:  # not a layer over the video
            return proceed()
        forward = call.forward
        geometry = forward.geometry if forward is not None else None
        if geometry is None:
            raise RuntimeError(f"causal frames: {ledger.name} is called without a known video grid")
        if call.mask is not None or call.plan is not None:
            raise RuntimeError(
                f"causal frames: {ledger.name} follows {call.planned or 'a mask of the model'} already; take one"
            )
        context = call.q.shape[1] - geometry.n_video
        if call.k.shape[1] != call.q.shape[1] or context < 0 or geometry.history:
            raise RuntimeError(
                f"causal frames: {ledger.name} has {call.q.shape[1]} queries and {call.k.shape[1]} keys, which are not "
                f"the grid {geometry.grid} and its context; run whole frames, without a subset of tokens"
            )
        key = "causal frames", self.layout, geometry.grid, context, geometry.text_first, call.q.device
        grid, first, device = geometry.grid, geometry.text_first, call.q.device
        call.plan = remembered(
            call.session.static, key, lambda: self.layout.plan(grid, context, context_first=first, device=device)
        )
        call.planned = "causal frames: planners know full attention only"
        return proceed()

    def fresh(self) -> None:
        """What takes the order off knows nothing of a copy, so that none has it."""


def causal_frames(handle: Handle, layout: CausalFrames | None = None) -> Callable[[], None]:
    """Make the attention of an accelerated model causal over frames, from the next call on, which begins a new
    generation.

    For models trained so whose diffusers class has no mask for it. SkyReels-V2 has its own (``num_frame_per_block``).

    Args:
        handle: of ``accelerate``.
        layout: see ``CausalFrames``; frame by frame by default.

    Returns:
        what takes it off again. A copy of the model does not have the order.

    Raises:
        RuntimeError: the handle was removed or something else stands there; at a call, where the tokens are not those
            of whole frames or a mask or plan says already what is read.
    """
    check_handle("causal_frames", handle)
    if not handle.active:
        raise RuntimeError("causal_frames: this handle was removed; call vdit_fast.accelerate on the model again")
    sessions = [root.session for root in handle.roots]
    if any(WHO in session.around_heads for session in sessions):
        raise RuntimeError("causal_frames: a cache or another causal order stands around attention; remove it first")
    around = _CausalHeads(layout or CausalFrames())
    for session in sessions:
        session.around_heads[WHO] = around
    handle.reset()  # what caches and planners remember was computed without

    def remove() -> None:
        standing = [session for session in sessions if session.around_heads.get(WHO) is around]
        for session in standing:
            del session.around_heads[WHO]
        if standing:
            handle.reset()

    return remove
