"""The planners that watch a model while it runs: one finds the stripes of a dense run, one searches the modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vdit_fast.ops import block_mass, score_lse
from vdit_fast.ops.attention import attention
from vdit_fast.planners import SparseVDiT
from vdit_fast.planners._mode_runs import Layout
from vdit_fast.planners._mode_table import LETTER, MadeFor
from vdit_fast.planners.base import Decision, Planner
from vdit_fast.tune.choice import choose, measure_costs, relative_errors

if TYPE_CHECKING:
    from vdit_fast.context import LayerContext
    from vdit_fast.plan import AttentionPlan

ROWS = 1024
"""Query tokens, evenly spread, whose attention weights make the column sums."""


@dataclass(frozen=True, kw_only=True)
class Watcher(Planner):
    """A planner that learns from every call that ``base`` leaves to its table; the same for all models that use it.

    Attributes:
        base: the planner being tuned; its common knobs hold.
        tick: called with (step, number of steps) as they begin.
        seen: the setting of the calls (``made_for``), the dtype and device, and why calls were left out.
    """

    base: SparseVDiT
    tick: Callable[[int, int], None] | None = field(default=None, compare=False)
    seen: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    dense: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    def __post_init__(self) -> None:
        for knob in fields(Planner):
            self._set(knob.name, getattr(self.base, knob.name))
        self._set("name", "tune")  # on the object: as a class attribute it would enter the registry
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        return self.base.to_dict()

    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        return self.base.plan(q, k, ctx)

    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        step = ctx.step
        if step.num_steps is None or step.step < 0:
            raise ValueError(
                "the number of denoising steps is unknown; give tune() the whole pipeline with its scheduler"
            )
        if self.tick is not None and ctx.layer == 0 and step.branch == 0:
            self.tick(step.step, step.num_steps)
        self.check_inputs(q, k, ctx)
        frames, height, width = ctx.grid
        made = MadeFor(ctx.family, ctx.num_layers, q.shape[2], (frames, height, width), ctx.text, step.num_steps)
        if self.seen.setdefault("made_for", made) != made:
            raise ValueError(f"the runs differ: {self.seen['made_for']} and {made}; tune one setting at a time")
        self.seen.update(dtype=q.dtype, device=q.device)
        reason = self.decide(ctx)
        if reason is not None:
            self.dense[reason] += 1
            return Decision(reason=reason)
        return self.watch(q, k, v, ctx)

    def watch(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        """What a call that is not dense does."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Columns(Watcher):
    """Runs dense and sums, per layer and head, the attention weights that fall on each key block."""

    sums: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    counts: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def watch(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        place = Layout(ctx, self.base.block, self.base.sinks)
        if place.stripes:
            video = q[:, ctx.video_slice]
            count = min(ROWS, ctx.n_video)
            sampled = torch.arange(count, device=q.device) * ctx.n_video // count
            rows = video[:, sampled]
            late = slice(ctx.video_slice.start + place.early, ctx.video_slice.stop)
            weight, kv_len = score_lse(rows, k, kv_len=ctx.kv_len), ctx.kv_len
            if kv_len is not None:
                padding = ctx.video_slice.start + sampled >= kv_len.to(q.device).view(-1, 1, 1)
                weight = weight.masked_fill(padding, -torch.inf)  # a padding row has no say
                kv_len = (kv_len - late.start).clamp(0, place.late)
            mass = block_mass(rows, k[:, late], weight, count, self.base.block, kv_len=kv_len)
            mean = mass.double().mean((0, 2)).cpu()
            self.sums[ctx.layer] = self.sums.get(ctx.layer, torch.zeros_like(mean)) + mean
            self.counts[ctx.layer] = self.base.stripe_count(ctx)
        return Decision(reason="calibration")

    def stripes(self) -> dict[str, list[int]]:
        """The blocks with the highest sums, in the form of the knob ``stripes``."""
        found = {}
        for layer, sums in self.sums.items():
            for head, row in enumerate(sums):
                found[f"{layer}.{head}"] = row.topk(self.counts[layer]).indices.tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class Search(Watcher):
    """Computes every mode's output beside the exact one, and goes on with the best mode known so far.

    Errors are averaged over the calls of a (step range, layer): its steps, guidance branches and runs.

    Attributes:
        modes: the sparse modes to try.
        price, max_loss: of ``choose``.
        timed: costs are times measured at the first call, else densities.
        groups: step ranges, None: one per step.
    """

    modes: tuple[str, ...]
    price: float
    max_loss: float
    timed: bool = True
    groups: int | None = None
    rounds: int = 3
    costs: dict[str, float] = field(default_factory=dict, compare=False, repr=False)
    densities: dict[str, float] = field(default_factory=dict, compare=False, repr=False)
    errors: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)
    calls: Counter[tuple[int, int]] = field(default_factory=Counter, compare=False, repr=False)
    mode_plans: dict[Any, AttentionPlan] = field(default_factory=dict, compare=False, repr=False)
    row_plans: dict[int, tuple[str, AttentionPlan]] = field(default_factory=dict, compare=False, repr=False)

    def group(self, step: int, steps: int) -> int:
        """Index of the step range."""
        return step if self.groups is None else step * min(self.groups, steps) // steps

    def watch(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        heads = q.shape[2]
        plans = {mode: self._mode_plan(LETTER[mode] * heads, ctx, q) for mode in self.modes}
        if not self.costs:
            self.densities.update({mode: float(plan.density_per_head.mean()) for mode, plan in plans.items()})
            timed = self.timed and measure_costs(plans, q, k, v, ctx.kv_len, self.rounds)
            self.costs.update(timed or self.densities)
        exact = cast(Tensor, attention(q, k, v, kv_len=ctx.kv_len))
        found = []
        for mode in self.modes:  # one output at a time
            out = None if mode == "skip" else cast(Tensor, attention(q, k, v, plans[mode], kv_len=ctx.kv_len))
            found.append(relative_errors(exact, {mode: out}, ctx.kv_len)[mode])
        place = self.group(ctx.step.step, ctx.step.num_steps or 1), ctx.layer
        errors = torch.stack(found, -1).cpu()
        self.errors[place] = self.errors.get(place, torch.zeros_like(errors)) + errors
        self.calls[place] += 1
        row = self.row(place)
        if set(row) == {"f"}:
            return Decision(reason="every head is full")
        return Decision(self._row_plan(row, ctx, q))

    def row(self, place: tuple[int, int]) -> str:
        """Letters of the best modes known for a (step range, layer)."""
        mean = self.errors[place] / self.calls[place]
        chosen = choose(mean, [self.costs[mode] for mode in self.modes], self.price, self.max_loss)
        return "".join("f" if i < 0 else LETTER[self.modes[i]] for i in chosen.tolist())

    def _mode_plan(self, row: str, ctx: LayerContext, q: Tensor) -> AttentionPlan:
        """All heads in one mode; kept, as every call needs it. Stripes belong to a layer."""
        key = (row, ctx.layer if "v" in row else None)
        if key not in self.mode_plans:
            self.mode_plans[key] = self.base.runs(row, q.shape[2], ctx, q.device)
        return self.base.in_order(self.mode_plans[key], row, ctx)

    def _row_plan(self, row: str, ctx: LayerContext, q: Tensor) -> AttentionPlan:
        """The layer's best row known; only the latest is kept, as rows change with almost every call."""
        known = self.row_plans.get(ctx.layer)
        if known is None or known[0] != row:
            known = self.row_plans[ctx.layer] = row, self.base.runs(row, q.shape[2], ctx, q.device)
        return self.base.in_order(known[1], row, ctx)

    def table(self) -> list[dict[str, Any]]:
        """The knob ``modes``: dense where nothing was searched, equal neighbours joined."""
        made: MadeFor = self.seen["made_for"]
        entries: list[dict[str, Any]] = []
        for step in range(made.steps):
            places = [(self.group(step, made.steps), layer) for layer in range(made.layers)]
            rows = [self.row(place) if place in self.errors else "f" * made.heads for place in places]
            if not entries or entries[-1]["layers"] != rows:
                entries.append({"step": step, "layers": rows})
        return entries

    def found(self, stripes: dict[str, list[int]], record: dict[str, Any]) -> SparseVDiT:
        """The tuned planner, with the stripes of those heads that are vertical somewhere."""
        table = self.table()
        used = {
            f"{layer}.{head}"
            for entry in table
            for layer, row in enumerate(entry["layers"])
            for head, letter in enumerate(row)
            if letter == "v"
        }
        kept = {place: blocks for place, blocks in stripes.items() if place in used}
        return replace(self.base, modes=table, stripes=kept, made_for=self.seen["made_for"], record=record)
