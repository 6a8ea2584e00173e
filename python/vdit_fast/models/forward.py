"""What is known about one running forward of a transformer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.context import StepContext
from vdit_fast.models.geometry import Geometry, Volume
from vdit_fast.planners.base import Decision

if TYPE_CHECKING:
    from vdit_fast.models.row_shard import RowShard
    from vdit_fast.models.row_subset import RowRun

__all__ = ["Forward", "in_backward"]

Distinct = tuple[Tensor, Tensor, Tensor]
"""int64 [K] and [K]: batch item and token that have a timestep first; int32 [B, N]: which of the K each token has."""


def in_backward() -> bool:
    """Whether autograd is running: what runs a forward then is gradient checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(eq=False)
class Forward:
    """One running forward of the transformer."""

    geometry: Geometry | None
    step: StepContext
    timestep: Any = None
    """The transformer's argument."""
    latent_row: int = 0
    """Size of the last dimension of its latents [B, ..., W]; 0 where they come as rows per token."""
    volume: Volume | None = None
    """Where layers see frames or places one at a time, and something is hooked to them."""
    mask: weakref.ref[Tensor] | None = None
    """The attention mask that was found to say what the geometry says."""
    cached: bool = False
    """Whether the feature cache has seen it: it acts once per forward."""
    agreed: bool = False
    """Whether the ranks under diffusers' context parallelism have compared what they were given."""
    run: Any = None
    """What the feature cache does with it, where it stands around blocks."""
    decisions: dict[int, tuple[Decision, Tensor | None]] = field(default_factory=dict)
    """Decisions by layer, kept only while gradients are recorded: recomputation must attend to the same keys. With
    some of the queries' values where there is a plan, by which a forward is known again: running a block again gives
    the same bits."""
    tables: dict[Any, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    """Rotary tables that stand in for the model's, by the model's shape, dtype and device; None: the model's own."""
    subset: RowRun | None = None
    """How its blocks run on some of the tokens, or keep what later steps need to; None: they do neither."""
    memory: tuple[()] | tuple[Tensor | None] = ()
    """Its memory rows, made once per forward."""
    modulation: Any = None
    """Trace of what makes its blocks' modulation beside the timestep, where memory wants it; None: not known."""
    shard: RowShard | None = None
    """Which rows its blocks get on this rank; None: all."""
    fed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Another transformer's keys and values that its layers read, kept only while gradients are recorded."""
    modulated_by_timestep: bool = True
    """Whether tokens of equal timesteps have equal rows of modulation."""
    _distinct: Distinct | None = None

    def keep(self, layer: int, decision: Decision, q: Tensor) -> None:
        """Keep a layer's decision for recomputation; q [B,Lq,H,D]."""
        # without `observe`, which acts once and may hold q, k and v that checkpointing is there to free
        self.decisions[layer] = replace(decision, observe=None), None if decision.plan is None else _sample(q)

    def kept(self, layer: int, q: Tensor) -> Decision:
        """The decision that was kept for a layer. Raises RuntimeError where the queries are of another forward."""
        decision, seen = self.decisions[layer]
        if seen is not None and not torch.equal(seen, _sample(q)):
            raise RuntimeError(
                "gradient checkpointing runs a forward again whose plans a later one has replaced; call "
                "backward before the next forward, or train with dense attention (config 'exact')"
            )
        return decision

    def distinct(self, batch: int, tokens: int) -> Distinct | None:
        """The few different timesteps of ``batch`` x ``tokens`` tokens, None where there are many of them or where the
        argument says less, or where an earlier call of this forward was about other tokens. A GPU is waited for
        once per forward."""
        timestep = self.timestep
        if not self.modulated_by_timestep:
            return None
        if self.subset is not None and self.subset.partial:  # the tokens are not those of the timesteps
            return None
        if not isinstance(timestep, Tensor) or timestep.ndim < 2 or timestep.shape[0] != batch or timestep.is_meta:
            return None
        timestep = timestep.flatten(1)  # Sana-Video's image pipeline gives a grid of them
        if self._distinct is None:
            whole = tokens if self.shard is None else self.shard.total
            if timestep.shape[1] == 0 or whole % timestep.shape[1]:  # neither one per token nor one per frame
                return None
            per_token = timestep.repeat_interleave(whole // timestep.shape[1], dim=1)
            per_token = per_token if self.shard is None else self.shard.own(per_token)
            if per_token.shape[1] != tokens:
                return None
            # per batch item: other conditions may enter the modulation too
            values, index = torch.unique(per_token, return_inverse=True)
            item = torch.arange(batch, device=index.device).view(-1, 1)
            values, index = torch.unique(item * len(values) + index, return_inverse=True)
            first = torch.full(values.shape, batch * tokens, device=index.device)
            first.scatter_reduce_(0, index.flatten(), torch.arange(batch * tokens, device=index.device), "amin")
            self._distinct = first // tokens, first % tokens, index.to(torch.int32)
        count, index = len(self._distinct[0]), self._distinct[2]
        return self._distinct if index.shape == (batch, tokens) and 4 * count <= batch * tokens else None


def _sample(q: Tensor) -> Tensor:
    return q.detach()[:, :: max(1, q.shape[1] // 16), :, 0].clone()
