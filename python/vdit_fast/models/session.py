"""The state behind one accelerated transformer: its configuration, the running forward, its layers' ledgers."""

from __future__ import annotations

import copy
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vdit_fast.caching.engine import FeatureCache, joined_phase
from vdit_fast.config import Config
from vdit_fast.models.block_causal import block_causal_plan, is_block_causal
from vdit_fast.models.forward import Forward, in_backward
from vdit_fast.models.geometry import Geometry
from vdit_fast.models.heads import AroundHeads, HeadsCall, enter_heads, execute
from vdit_fast.models.hooks import Hooks
from vdit_fast.models.kernels import missing_kernel
from vdit_fast.models.layer_context import layer_context
from vdit_fast.models.ledger import LayerLedger, stamp
from vdit_fast.models.linear_layers import StandIn, convert, converted, stand_in
from vdit_fast.models.tracker import StepTracker
from vdit_fast.ops.short_attention import MAX_SHORT_KEYS
from vdit_fast.plan.memo import remembered
from vdit_fast.planners.base import Decision

if TYPE_CHECKING:
    from vdit_fast.models.blocks import Around
    from vdit_fast.models.memory import Memory
    from vdit_fast.models.qk import BeforeRotation
    from vdit_fast.models.rotary import PositionFn
    from vdit_fast.models.text_kv import TextKV
    from vdit_fast.regions.regions import RegionRun

__all__ = ["Geometry", "Session", "session_by_id"]

logger = logging.getLogger("vdit_fast")

STATIC_ENTRIES = 64
STATIC_PER_LAYER = 4
"""Most entries that outlive a generation: a few grids of training buckets, or a few of each layer."""

SOME_ROWS = "queries of some tokens only: planners see whole grids"
"""Why a layer runs dense in a step that computes a subset of the tokens."""

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
        self.fused: dict[str, str] = {}
        self.left: Counter[str] = Counter()
        self.unfused: Counter[str] = Counter()
        self.stand_ins: dict[int, StandIn] = {}
        self.state: dict[Any, Any] = {}
        self.static: dict[Any, Any] = {}
        self.cache = FeatureCache(config.cache, config.attention, config.subset)
        self.around: dict[str, Around] = {}
        self.around_attention: dict[str, Around] = {}
        self.around_heads: dict[str, AroundHeads] = {}
        self.before_rotation: BeforeRotation | None = None
        self.hooks = Hooks()
        self.standing: set[tuple[str, str]] = set()  # blocks and attention modules that are entered now
        self.guided = False  # whether its forward is entered by guidance parallelism
        self.text: TextKV | None = None
        self.positions: PositionFn | None = None
        self.regions: RegionRun | None = None  # also in around_heads
        self.repositioned: Counter[int] = Counter()
        self.streamed: Counter[str] = Counter()  # of generation chunk by chunk: frames, chunks, forwards
        self.forward: Forward | None = None
        self.forwards = 0
        self.steps: set[tuple[int, int]] = set()
        self._generation: int | None = None
        self._anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._told: set[str] = set()
        _sessions[self.id] = self

    @property
    def total(self) -> Callable[[Tensor], Tensor] | None:
        """Adds a tensor up over the ranks that share the sequence; None where nobody does."""
        return getattr(self.around_heads.get("sequence"), "total", None)

    @property
    def planned(self) -> int:
        """Number of layers that planners see."""
        return sum(ledger.planned for ledger in self.layers)

    @property
    def exchanged(self) -> bool:
        """Whether somebody exchanges the positions or keys of whole clips."""
        held = self.positions, self.before_rotation, self.regions, self.around_heads.get("streaming")
        return any(item is not None for item in held)

    def add_layer(self, name: str, always_dense: str | None = None, own_linear: bool = False) -> int:
        """Register a layer by module path, why no planner may see it, and whether it is linear; returns its index."""
        self.layers.append(LayerLedger(name, len(self.layers), self.planned, always_dense, own_linear))
        return len(self.layers) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        # For a copied model: the same layers and configuration, its own records.
        new = Session(self.config, copy.deepcopy(self.tracker, memo), self.expert, self.family)
        new.active = self.active
        new.positions = self.positions
        for layer in self.layers:
            new.add_layer(layer.name, layer.always_dense, layer.own_linear)
        convert(new, converted(self))
        new.stand_ins |= {layer: item for layer, item in self.stand_ins.items() if layer not in new.stand_ins}
        new.fused, new.left = dict(self.fused), self.left.copy()
        new.cache = self.cache.fresh()
        new.around = {name: new.cache if item is self.cache else item.fresh() for name, item in self.around.items()}
        new.around_attention = {layer: item.fresh() for layer, item in self.around_attention.items()}
        copies = {who: item.fresh() for who, item in self.around_heads.items()}
        new.around_heads = {who: item for who, item in copies.items() if item is not None}
        new.regions = cast("RegionRun | None", new.around_heads.get("regions"))
        new.hooks = self.hooks.fresh()
        if self.text is not None:
            new.text = type(self.text)(self.text.inputs, self.text.embedders)
        memo[id(self)] = new
        return new

    # ------------------------------------------------------------------ one forward
    def begin(self, timestep: Any, geometry: Geometry | None) -> None:
        """A forward of the transformer begins."""
        step = self.tracker.observe(timestep, self.expert)
        if step.generation != self._generation:
            self.forget()
            if self.text is not None:
                self.text.clear()
            self._generation = step.generation
            if len(self.static) > max(STATIC_ENTRIES, STATIC_PER_LAYER * len(self.layers)):
                self.static.clear()
        self.forward = self.cache.forward = Forward(geometry, step, timestep)
        self.cache.phase = joined_phase(self.regions, self.positions)
        self.forwards += 1
        self.steps.add((step.generation, step.step))

    def forget(self) -> None:
        """What planners remember, and what memory rows keep for another guidance branch, is out of date."""
        self.state.clear()
        memory = self.around.get("memory")
        if memory is not None:
            cast("Memory", memory).forget()

    def memory(self, frame_block: int | None) -> dict[Any, Any]:
        """What planners remember of a frame block, of the whole clip where there are none."""
        return self.state if frame_block is None else self.state.setdefault(("frame block", frame_block), {})

    def release(self, frame_block: int) -> None:
        """A frame block is finished: nothing is remembered of it any longer."""
        self.state.pop(("frame block", frame_block), None)
        self.cache.release(frame_block)

    def forward_of(self, anchor: Tensor) -> Forward | None:
        """The forward that a call belongs to: the running one, except inside backward. There gradient checkpointing
        runs an earlier one again, whichever has begun since; its anchor, a tensor made once per forward, tells."""
        return self._anchors.get(anchor, self.forward) if in_backward() else self.forward

    def anchor(self, tensor: Tensor, forward: Forward) -> None:
        """Note a tensor that is made once per forward."""
        self._anchors[tensor] = forward

    def forward_among(self, tensors: Iterable[Tensor]) -> Forward | None:
        """``forward_of`` a call that gets these tensors, where nobody knows which of them is the anchor."""
        known = (self._anchors.get(tensor) for tensor in tensors) if in_backward() else ()
        return next((forward for forward in known if forward is not None), self.forward)

    def begin_records(self) -> None:
        """Records and what planners and caches remember begin anew, as what follows would not fit to them."""
        self.layers = [old.fresh() for old in self.layers]
        self.steps.clear()
        self.forwards = 0
        self.unfused.clear()
        self.forget()
        self.cache.forget()

    def reconfigure(self, config: Config) -> None:
        """Use another configuration from the next call on; the records begin anew, as they would mix the two."""
        self.config = config
        self.begin_records()
        self.static.clear()
        self.cache = FeatureCache(config.cache, config.attention, config.subset)
        self.forward = None  # of the old configuration, and holds what its cache kept
        self.hooks.calls.clear()
        self.repositioned.clear()
        if self.regions is not None:
            self.regions.clear()
        self.streamed.clear()
        self._told.clear()

    # ------------------------------------------------------------------ one attention call
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor | None,
        anchor: Tensor | None,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer: q [B,Lq,H,D], k, v [B,Lk,Hkv,D] -> [B,Lq,H,D]; scale None is D ** -0.5.

        ``mask`` is the bool [1,1,N,N] of a transformer whose geometry has a frame block.
        """
        call = HeadsCall(self, layer, q, k, v, kv_len, anchor, scale, mask)
        return enter_heads(call, self._heads)

    def _heads(self, call: HeadsCall) -> Tensor:
        """``attend`` inside of everybody who stands around it."""
        run, layer = self.forward.subset if self.forward is not None else None, call.layer
        if call.recorded and call.anchor is not None and self.forward is not None and not in_backward():
            self._anchors[call.anchor] = self.forward  # before any kind of attention: all of them may run again
        if run is not None:
            call.k, call.v, call.kv_len = run.attend(layer, call.k, call.v, call.kv_len)
        found = self.stand_ins.get(layer)
        if found is None:
            out = self._softmax(call)
        else:
            out = stand_in(found, self.layers[layer], call, lambda: self._softmax(call), again=in_backward())
        if not self.hooks.at_heads(layer):
            return out
        forward = call.forward
        if self.layers[layer].linear:
            return self.hooks.heads(self, forward, layer, out, lambda plan: self.no_plan(layer))
        return self.hooks.heads(self, forward, layer, out, call.over)

    def no_plan(self, layer: int) -> Tensor:
        """What a hook gets that asks a linear layer for attention over a plan."""
        raise RuntimeError(
            f"attend: {self.layers[layer].name} is linear and has no attention over a plan; hook other layers"
        )

    def _softmax(self, call: HeadsCall) -> Tensor:
        """The call in a layer of softmax attention, as planned."""
        short = self._is_short(call)
        reason = missing_kernel(call.q, short) if short else missing_kernel(call.q)
        if reason is not None:
            self.fall_back(call.layer, reason)
            return call.dense() if call.plan is None else call.over(call.plan)
        forward, ledger = self.forward, self.layers[call.layer]
        if call.recorded and call.anchor is not None:
            forward = self.forward_of(call.anchor)  # same plan as in the first run
        geometry = forward.geometry if forward is not None else None
        if call.mask is not None and call.plan is None:
            if forward is None or geometry is None or not self._understands(forward, geometry, call.mask):
                self.fall_back(call.layer, "an attention mask of this form is not understood")
                return call.dense()
            return self._attend(ledger, forward, call, geometry)
        if geometry is None or not geometry.history or self.config.attention is None or call.plan is not None:
            return self._attend(ledger, forward, call)
        call.q, call.k, call.v = (geometry.video_first(x) for x in (call.q, call.k, call.v))
        return geometry.in_model_order(self._attend(ledger, forward, call))

    def _is_short(self, call: HeadsCall) -> bool:
        whole = call.plan is None and not call.segments
        return whole and self.layers[call.layer].always_dense is not None and call.k.shape[1] <= MAX_SHORT_KEYS

    def _understands(self, forward: Forward, geometry: Geometry, mask: Tensor) -> bool:
        """Whether the geometry says what the mask says; looked at once per forward."""
        if forward.mask is None or forward.mask() is not mask:
            if not is_block_causal(mask, geometry):
                return False
            forward.mask = weakref.ref(mask)
        return True

    def _attend(
        self, ledger: LayerLedger, forward: Forward | None, call: HeadsCall, causal: Geometry | None = None
    ) -> Tensor:
        short, device = self._is_short(call), call.q.device
        grad = call.recorded
        replay = grad and in_backward()
        if replay and forward is not None and ledger.layer in forward.decisions:
            return execute(forward.kept(ledger.layer, call.q), call, short)
        begin = stamp(device)
        if call.plan is not None:
            decision = self._planned(ledger, call)
        elif causal is None:
            decision = self._decide(ledger, forward, call)
        else:
            decision = self._block_causal(ledger, causal, device)
        middle = stamp(device)
        out = execute(decision, call, short)
        end = stamp(device)
        ledger.calls += 1
        ledger.attention_time.add(middle, end)
        if self.config.attention is not None:
            ledger.plan_time.add(begin, middle)
        if decision.plan is not None and not call.whole:
            ledger.sparse_calls += 1
        ledger.add_density(
            forward.step.step if forward is not None else -1,
            1.0 if decision.plan is None else decision.plan.density_per_head.mean(0),
        )
        if grad and forward is not None:
            forward.keep(ledger.layer, decision, call.q)
        return out

    def _planned(self, ledger: LayerLedger, call: HeadsCall) -> Decision:
        if self.config.attention is not None:
            ledger.count(ledger.unasked, call.planned)
        return Decision(call.plan)

    def _block_causal(self, ledger: LayerLedger, geometry: Geometry, device: torch.device) -> Decision:
        if self.config.attention is not None:
            ledger.count(ledger.unasked, "block-causal frames: planners know full attention only")
        key = "block-causal", geometry, device
        return Decision(remembered(self.static, key, lambda: block_causal_plan(geometry, device)))

    def _decide(self, ledger: LayerLedger, forward: Forward | None, call: HeadsCall) -> Decision:
        planner = self.config.attention
        if planner is None:
            return Decision()
        if ledger.always_dense is not None:
            ledger.count(ledger.dense, ledger.always_dense)
            return Decision(reason=ledger.always_dense)
        if forward is not None and forward.subset is not None and forward.subset.partial:
            ledger.count(ledger.dense, SOME_ROWS)
            return Decision(reason=SOME_ROWS)
        context, problem = layer_context(self, ledger, forward, call)
        if context is None:
            self.fall_back(ledger.layer, problem, served_dense=True)
            return Decision(reason=problem)
        q, k, v = call.q.detach(), call.k.detach(), call.v.detach()
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):  # selection scores are fp32
            # planners scale scores by D ** -0.5
            decision = planner.decision(
                q if call.scale is None else q * (call.scale * q.shape[-1] ** 0.5), k, v, context
            )
        if decision.plan is None:
            reason = decision.reason or "the planner keeps it dense"
            ledger.count(ledger.dense, reason)
            if self.config.verbose:
                self._tell(logging.INFO, f"{ledger.name} runs dense: {reason}")
        return decision

    # ------------------------------------------------------------------ what could not be done
    def fall_back(self, layer: int, reason: str, served_dense: bool = False) -> None:
        """A call cannot be served as configured: count and log it, or raise when the configuration says so."""
        ledger = self.layers[layer]
        if ledger.converted:
            raise RuntimeError(
                f"{ledger.name} is linear and cannot run as that: {reason}; take layer {layer} out of linear.layers"
            )
        if self.config.on_unsupported == "error":
            raise RuntimeError(
                f"{ledger.name} cannot be served: {reason}; set on_unsupported='dense' to run such calls densely"
            )
        ledger.count(ledger.fallbacks, reason)
        how = "dense through this package's kernel" if served_dense else "dense, as in the original model"
        self._tell(logging.WARNING, f"{ledger.name} runs {how}: {reason}", key=reason)

    def tell(self, text: str) -> None:
        """Log a fallback once."""
        self._tell(logging.WARNING, text)

    def _tell(self, level: int, text: str, key: str | None = None) -> None:
        if (key or text) not in self._told:
            self._told.add(key or text)
            logger.log(level, "vdit_fast: %s (said once, counted in report())", text)
