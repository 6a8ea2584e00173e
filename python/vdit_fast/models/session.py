"""The state behind one accelerated transformer: its configuration, the running forward, its layers' ledgers."""

from __future__ import annotations

import copy
import itertools
import logging
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vdit_fast.caching.engine import OutputCache
from vdit_fast.config import Config
from vdit_fast.context import LayerContext, StepContext
from vdit_fast.models.kernels import dense_attention, missing_kernel
from vdit_fast.models.ledger import LayerLedger, stamp
from vdit_fast.models.tracker import StepTracker
from vdit_fast.ops.attention import attention
from vdit_fast.ops.short_attention import MAX_SHORT_KEYS, short_attention
from vdit_fast.planners.base import Decision

__all__ = ["Forward", "Geometry", "Session", "session_by_id"]

logger = logging.getLogger("vdit_fast")

STATIC_ENTRIES = 64
STATIC_PER_LAYER = 4
"""Most entries that outlive a generation: a few grids of training buckets, or a few of each layer."""

_ids = itertools.count(1)
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def session_by_id(number: int) -> Session:
    """The live session with this id, which is the first entry of a layer's handle tensor."""
    session = _sessions.get(number)
    if session is None:
        raise RuntimeError(
            f"accelerated layer of session {number} is called, but that session is gone; "
            "call vdit_fast.accelerate on the model again"
        )
    return session


def _sample(q: Tensor) -> Tensor:
    """Some of q's values, by which a forward is known again: running a block again gives the same bits."""
    return q.detach()[:, :: max(1, q.shape[1] // 16), :, 0].clone()


def _execute(decision: Decision, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, short: bool) -> Tensor:
    """The attention call that a planner decided on."""
    if short:
        return short_attention(q, k, v, kv_len=kv_len)
    options: dict[str, Any] = {"row_scale": decision.row_scale, "kv_len": kv_len}
    if decision.observe is None:
        out = cast(Tensor, attention(q, k, v, decision.plan, **options))
    else:
        out, lse = attention(q, k, v, decision.plan, **options, return_lse=True)
        with torch.no_grad():
            decision.observe(out.detach(), lse.detach())
    return out if decision.residual is None else out + decision.residual


@dataclass(frozen=True)
class Geometry:
    """Token layout of one forward."""

    grid: tuple[int, int, int]
    """(frames, height, width) in tokens."""
    text: int = 0
    """Text tokens in the joint sequence."""
    text_first: bool = False

    @property
    def n_video(self) -> int:
        frames, height, width = self.grid
        return frames * height * width


@dataclass(eq=False)
class Forward:
    """One running forward of the transformer."""

    geometry: Geometry | None
    step: StepContext
    cached: bool = False
    """Whether the cache policy's wrapper has seen it: a wrapper acts once per forward."""
    decisions: dict[int, tuple[Decision, Tensor | None]] = field(default_factory=dict)
    """Decisions by layer, kept only while gradients are recorded: recomputation must attend to the same keys."""


class Session:
    """Runs the attention of one accelerated transformer.

    Args:
        config: what to do.
        tracker: the denoising run's progress, shared between the transformers of a pipeline.
        expert: the transformer's name in its pipeline.
        family: its model family.
    """

    def __init__(self, config: Config, tracker: StepTracker, expert: str, family: str = "") -> None:
        self.id = next(_ids)
        self.config = config
        self.tracker = tracker
        self.expert = expert
        self.family = family
        self.active = True
        self.layers: list[LayerLedger] = []
        self.state: dict[Any, Any] = {}
        self.static: dict[Any, Any] = {}
        self.cache = OutputCache()
        self.forward: Forward | None = None
        self.forwards = 0
        self.steps: set[tuple[int, int]] = set()
        self._generation: int | None = None
        self._anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._told: set[str] = set()
        _sessions[self.id] = self

    def add_layer(self, name: str, dense_only: str = "") -> int:
        """Register a layer by module path, and why no planner is asked about it; returns its index."""
        self.layers.append(LayerLedger(name=name, layer=len(self.layers), dense_only=dense_only))
        return len(self.layers) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        # For a copied model: the same layers and configuration, its own records.
        new = Session(self.config, copy.deepcopy(self.tracker, memo), self.expert, self.family)
        new.active = self.active
        for layer in self.layers:
            new.add_layer(layer.name, layer.dense_only)
        memo[id(self)] = new
        return new

    # ------------------------------------------------------------------ one forward
    def begin(self, timestep: Any, geometry: Geometry | None) -> None:
        """A forward of the transformer begins."""
        step = self.tracker.observe(timestep, self.expert)
        if step.generation != self._generation:
            self.state.clear()
            self._generation = step.generation
            if len(self.static) > max(STATIC_ENTRIES, STATIC_PER_LAYER * len(self.layers)):
                self.static.clear()
        self.forward = Forward(geometry, step)
        self.forwards += 1
        self.steps.add((step.generation, step.step))

    def reconfigure(self, config: Config) -> None:
        """Use another configuration from the next call on; the records begin anew, as they would mix the two."""
        self.config = config
        self.layers = [old.fresh() for old in self.layers]
        self.steps.clear()
        self.forwards = 0
        self.state.clear()
        self.static.clear()
        self.cache = OutputCache()
        self._told.clear()

    # ------------------------------------------------------------------ one attention call
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, anchor: Tensor | None
    ) -> Tensor:
        """Attention of one layer: q [B,Lq,H,D], k, v [B,Lk,H,D] -> [B,Lq,H,D]."""
        ledger = self.layers[layer]
        short = bool(ledger.dense_only) and k.shape[1] <= MAX_SHORT_KEYS
        reason = missing_kernel(q, short) if short else missing_kernel(q)
        if reason is not None:
            self.fall_back(layer, reason)
            return dense_attention(q, k, v, kv_len)
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        forward = self.forward
        if grad:
            # Inside backward this is gradient checkpointing's second run: same plan as in the first one, whichever
            # forward has begun since. The anchor (a tensor made once per forward) says which forward it was.
            if torch._C._current_graph_task_id() != -1:
                forward = self._anchors.get(anchor, forward) if anchor is not None else forward
                if forward is not None and layer in forward.decisions:
                    decision, seen = forward.decisions[layer]
                    if seen is not None and not torch.equal(seen, _sample(q)):
                        raise RuntimeError(
                            "gradient checkpointing runs a forward again whose plans a later one has replaced; call "
                            "backward before the next forward, or train with dense attention (config 'exact')"
                        )
                    return _execute(decision, q, k, v, kv_len, short)
            elif anchor is not None and forward is not None:
                self._anchors[anchor] = forward
        begin = stamp(q.device)
        decision = self._decide(ledger, forward, q, k, v, kv_len)
        middle = stamp(q.device)
        out = _execute(decision, q, k, v, kv_len, short)
        end = stamp(q.device)
        ledger.calls += 1
        ledger.attention_time.add(middle, end)
        if self.config.attention is not None:
            ledger.plan_time.add(begin, middle)
        if decision.plan is not None:
            ledger.sparse_calls += 1
        ledger.add_density(
            forward.step.step if forward is not None else -1,
            1.0 if decision.plan is None else decision.plan.density_per_head.mean(0),
        )
        if grad and forward is not None:
            # without `observe`, which acts once and may hold q, k and v that checkpointing is there to free
            kept = replace(decision, observe=None)
            forward.decisions[layer] = kept, None if kept.plan is None else _sample(q)
        return out

    def _decide(
        self, ledger: LayerLedger, forward: Forward | None, q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None
    ) -> Decision:
        planner = self.config.attention
        if planner is None:
            return Decision()
        if ledger.dense_only:
            ledger.count(ledger.dense, ledger.dense_only)
            return Decision(reason=ledger.dense_only)
        context, problem = self._context(ledger, forward, q, kv_len)
        if context is None:
            self.fall_back(ledger.layer, problem, served_dense=True)
            return Decision(reason=problem)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):  # selection scores are fp32
            decision = planner.decision(q.detach(), k.detach(), v.detach(), context)
        if decision.plan is None:
            reason = decision.reason or "the planner keeps it dense"
            ledger.count(ledger.dense, reason)
            if self.config.verbose:
                self._tell(logging.INFO, f"{ledger.name} runs dense: {reason}")
        return decision

    def _context(
        self, ledger: LayerLedger, forward: Forward | None, q: Tensor, kv_len: Tensor | None
    ) -> tuple[LayerContext | None, str]:
        if forward is None:
            return None, "called outside a forward of its transformer"
        geometry = forward.geometry
        if geometry is None:
            return None, "the transformer's input has no known video grid"
        tokens = geometry.n_video + geometry.text
        if q.shape[1] != tokens:
            return None, f"{q.shape[1]:,} tokens are not the grid {geometry.grid} plus {geometry.text} text tokens"
        context = LayerContext(
            layer=ledger.layer,
            num_layers=len(self.layers),
            name=ledger.name,
            grid=geometry.grid,
            n_video=geometry.n_video,
            text=geometry.text,
            text_first=geometry.text_first,
            kv_len=kv_len,
            step=forward.step,
            state=self.state,
            family=self.family,
            static=self.static,
        )
        return context, ""

    # ------------------------------------------------------------------ what could not be done
    def fall_back(self, layer: int, reason: str, served_dense: bool = False) -> None:
        """A call cannot be served as configured: count and log it, or raise when the configuration says so."""
        ledger = self.layers[layer]
        if self.config.on_unsupported == "error":
            raise RuntimeError(
                f"{ledger.name} cannot be served: {reason}; set on_unsupported='dense' to run such calls densely"
            )
        ledger.count(ledger.fallbacks, reason)
        how = "dense through this package's kernel" if served_dense else "dense, as in the original model"
        self._tell(logging.WARNING, f"{ledger.name} runs {how}: {reason}", key=reason)

    def _tell(self, level: int, text: str, key: str | None = None) -> None:
        if (key or text) not in self._told:
            self._told.add(key or text)
            logger.log(level, "vdit_fast: %s (said once, counted in report())", text)
