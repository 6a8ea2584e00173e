"""Sparse-vDiT: a static table gives every head its mode (full, skip, diagonal, multi-diagonal, vertical stripes)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import _checks
from ._mode_runs import HeadRuns, Layout, join
from ._mode_table import (
    MadeFor,
    Stripes,
    Table,
    numbers,
    parse_record,
    parse_stripes,
    parse_table,
    stripes_form,
    table_form,
)
from ._windows import band_width
from .base import Decision, Planner

if TYPE_CHECKING:
    from ..context import LayerContext
    from ..plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class SparseVDiT(Planner):
    """A fixed pattern per step range, layer and head (Sparse-vDiT, arXiv 2506.03065), found offline by a search.

    Modes of a head, and their letters in a table:
        full (f): every key.
        skip (s): no key; the output is zero.
        diagonal (d): a band around the query in frame-major order (near frames).
        multi_diagonal (m): the same band in token-major order (all frames of near places).
        vertical (v): the same keys for all queries: text, the first `sinks` frames, and the head's `stripes`.

    The band holds the keys at most w tokens away, w = S (1 − √(1 − s)), s = 1 − sparsity − 2·text/S (Sparse VideoGen's
    closed form, arXiv 2502.01776), in blocks: a key block is read when its centre lies within w of the query block's,
    or when the two overlap. All heads of a layer run in one launch, each in its own token order. Outside skipped heads,
    text is dense and the sinks are read by everyone, on top of the band.

    Knobs besides those of `Planner`:
        modes: a mode's name; a string with a letter per head; a list of such strings, one per layer; or a list of
            {"step": first step, "layers": any of these}, one per step range.
        sparsity: fraction of all pairs, text included, that the modes d, m and v drop, in [0, 1); 0 drops nothing in a
            band.
        block: tokens per block of the video, in frame-major or token-major order.
        sinks: 1 here, as in Sparse VideoGen's masks.
        stripes: {"layer.head": "0-3,7"}: key blocks of vertical heads, counted after the sinks in frame-major order.
        made_for: family, layers, heads, grid, text and steps of the search. A call of another setting is an error.
        force: use the table in another setting all the same: at the nearest relative time, stripes at the same relative
            place. Layers and heads must still be equal.
        record: what the search noted (machine, costs, ...), a mapping; kept, not used.

    Raises:
        ValueError, TypeError: a bad knob; in `decide` and `plan`, a call that the table does not fit.
    """

    name: ClassVar[str] = "sparse_vdit"

    modes: Table | Any = "full"
    sparsity: float = 0.75
    block: int = 128
    sinks: int = 1
    stripes: Stripes | Any = ()
    made_for: MadeFor | Any = None
    force: bool = False
    record: str | Any = "{}"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("modes", parse_table(self.modes))
        self._set("sparsity", _checks.fraction("sparsity", self.sparsity))
        self._set("block", _checks.count("block", self.block, least=1))
        self._set("stripes", parse_stripes(self.stripes))
        self._set("made_for", MadeFor.parse(self.made_for))
        self._check_table()
        _checks.switch("force", self.force)
        self._set("record", parse_record(self.record))

    def to_dict(self) -> dict[str, Any]:
        made_for = None if self.made_for is None else self.made_for.to_dict()
        return {
            **super().to_dict(),
            "modes": table_form(self.modes),
            "stripes": stripes_form(self.stripes),
            "made_for": made_for,
            "record": json.loads(self.record),
        }

    # ------------------------------------------------------------------ the table
    def _check_table(self) -> None:
        """The table, its stripes and ``made_for`` tell of one model."""
        made = self.made_for
        rows = [rows for _, rows in self.modes]
        if made is None:
            tall, wide = max(map(len, rows)), max(len(row) for r in rows for row in r)  # 1 stands for all
            self._check_stripes(tall if tall > 1 else None, wide if wide > 1 else None, "table")
            return
        self._check_stripes(made.layers, made.heads, "table")
        layers = {len(r) for r in rows} - {1, made.layers}
        heads = {len(row) for r in rows for row in r} - {1, made.heads}
        if layers or heads or self.modes[-1][0] >= made.steps:
            raise ValueError(
                f"modes has {max(map(len, rows))} layers, {max(len(row) for r in rows for row in r)} heads and step "
                f"ranges up to step {self.modes[-1][0]}, but made_for says {made.layers} layers, {made.heads} heads "
                f"and {made.steps} steps"
            )

    @cached_property
    def _last_stripes(self) -> tuple[int, int]:
        """The largest layer and the largest head that have stripes."""
        places = [(layer, head) for layer, head, _ in self.stripes] or [(-1, -1)]
        return max(layer for layer, _ in places), max(head for _, head in places)

    def _check_stripes(self, layers: int | None, heads: int | None, where: str) -> None:
        """Stripes are those of layers and heads that exist; None: not known here."""
        for name, last, number in zip(("layer", "head"), self._last_stripes, (layers, heads), strict=True):
            if number is not None and last >= number:
                raise ValueError(f"stripes name {name} {last}, but the {where} has {number} {name}s (from 0 on)")

    def decision(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Decision:
        self._check_heads(ctx.all_heads(q.shape[2]))  # also where the call stays dense
        return super().decision(q, k, v, ctx)

    def decide(self, ctx: LayerContext) -> str | None:
        self._check_setting(ctx)
        reason = super().decide(ctx)
        if reason is not None:
            return reason
        if len(self.modes) > 1 and ctx.step.step < 0:
            return "the table has step ranges but the denoising step is unknown"
        return "every head is full in the table" if set(self._row(ctx)) == {"f"} else None

    def _check_setting(self, ctx: LayerContext) -> None:
        made = self.made_for
        layers = {len(rows) for _, rows in self.modes} - {1}
        if made is not None:
            layers.add(made.layers)
        if layers - {ctx.num_layers}:
            raise ValueError(f"the sparse_vdit table has {max(layers)} layers, the model has {ctx.num_layers}")
        self._check_stripes(ctx.num_layers, None, "model")
        different = made.differences(ctx) if made is not None and not self.force else []
        if different:
            raise ValueError(
                f"the sparse_vdit table was made for {', '.join(different)}; search a table for this setting "
                "(vdit-fast tune), or set force to true to map this one"
            )

    def _check_heads(self, heads: int) -> None:
        """Raise ValueError when the model's heads are not the table's."""
        letters = max(len(row) for _, rows in self.modes for row in rows)
        wanted = self.made_for.heads if self.made_for is not None else heads if letters == 1 else letters
        if heads != wanted:
            raise ValueError(f"the sparse_vdit table has {wanted} heads, the model has {heads}")
        self._check_stripes(None, heads, "model")

    def _row(self, ctx: LayerContext) -> str:
        """Letters of this call's layer: one per head, or one for all."""
        step = self.made_for.step(ctx) if self.made_for is not None else ctx.step.step
        rows = next((rows for first, rows in reversed(self.modes) if first <= step), self.modes[0][1])
        row: str = rows[ctx.layer] if len(rows) > 1 else rows[0]
        return row

    # ------------------------------------------------------------------ plan
    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttentionPlan:
        self._check_setting(ctx)
        self.check_inputs(q, k, ctx)
        row, heads = self._row(ctx), q.shape[2]
        self._check_heads(ctx.all_heads(heads))
        row = str(ctx.own_heads(row)) if len(row) > 1 else row
        known = self._shared(row, heads, ctx, q.device)
        return self.in_order(known, row, ctx)

    def _shared(self, row: str, heads: int, ctx: LayerContext, device: torch.device) -> AttentionPlan:
        """`runs`, of which layers with the same row share one. It is kept as long as some layer uses it."""
        where = ctx.layer if "v" in row else None  # stripes belong to a layer
        content = (row, where, tuple(ctx.grid), ctx.text, ctx.text_first, heads, device)
        key = ("sparse_vdit plan", self, ctx.layer, ctx.step.expert, ctx.step.frame_block)
        used = ctx.static.get(key)
        if used is not None and used[0] == content:
            plan: AttentionPlan = used[1]
            return plan
        shared = ctx.static.setdefault(("sparse_vdit shared plans", self), WeakValueDictionary())
        found: AttentionPlan | None = shared.get(content)
        if found is None:
            with torch.inference_mode(False):
                found = shared[content] = self.runs(row, heads, ctx, device)
        ctx.static[key] = (content, found)
        return found

    def runs(self, row: str, heads: int, ctx: LayerContext, device: torch.device) -> AttentionPlan:
        """The plan of a row of letters, still without the heads' token orders.

        The table is host data, so the lists are made on the host, in their exact length, and copied without waiting.
        What a mode reads is found once per geometry and then only put together.
        """
        key = ("sparse_vdit modes", self, tuple(ctx.grid), ctx.text, ctx.text_first)
        if key not in ctx.static:
            ctx.static[key] = Layout(ctx, self.block, self.sinks), {}
        place, known = ctx.static[key]
        shared = len(set(row)) == 1 and "v" not in row
        letters = row[0] if shared else row * heads if len(row) == 1 else row
        for letter in set(letters) - {*known, "v"}:
            known[letter] = self._reads(letter, ctx, place)
        heads_read = [
            place.reads(self._columns(head, ctx, place), place.q_whole) if letter == "v" else known[letter]
            for head, letter in enumerate(letters, 0 if ctx.heads is None else ctx.heads.first)
        ]
        plan = join(heads_read, ctx.num_tokens)
        lists: dict[str, Any] = {name: _sent(getattr(plan, name), device) for name in ("tiles", "run_ptr", "runs")}
        return replace(plan, **lists)

    def in_order(self, plan: AttentionPlan, row: str, ctx: LayerContext) -> AttentionPlan:
        """The plan with its token orders, one for all heads where they agree.

        Those of a row that mixes orders are large (8·H·N bytes), so only the last such row's are kept.
        """
        if "m" not in row:
            return plan
        key = ("sparse_vdit orders", self.sinks, tuple(ctx.grid), ctx.text, ctx.text_first, plan.device)
        with torch.inference_mode(False):
            if key not in ctx.static:
                ctx.static[key] = token_major(ctx, 0, plan.device), token_major(ctx, self.sinks, plan.device)
            orders = ctx.static[key]
            if set(row) - {"m", "s"}:
                mixed = (key, [letter == "m" for letter in row])
                last = ctx.static.get("sparse_vdit last orders")
                if last is None or last[0] != mixed:
                    flags = _sent(torch.tensor(mixed[1]), plan.device)[None, :, None]
                    same = torch.arange(plan.lq, dtype=torch.int32, device=plan.device)
                    last = mixed, tuple(torch.where(flags, order, same) for order in orders)
                    ctx.static["sparse_vdit last orders"] = last
                orders = last[1]
        return replace(plan, q_order=orders[0], kv_order=orders[1])

    def _reads(self, letter: str, ctx: LayerContext, place: Layout) -> HeadRuns:
        """What a head of a mode without stripes reads."""
        if letter in "sf":
            return place.reads(letter == "f", place.q_whole, text=letter == "f")
        return place.reads(place.band(self.width(ctx), token_major=letter == "m"), place.q_len)

    def width(self, ctx: LayerContext) -> float:
        """Half the width of the band in tokens."""
        return band_width(self.sparsity, ctx)

    def stripe_count(self, ctx: LayerContext) -> int:
        """How many blocks besides text and sinks a vertical head reads for the sparsity."""
        place = Layout(ctx, self.block, self.sinks)
        budget = (1 - self.sparsity) * ctx.num_tokens - ctx.text - place.early
        return min(max(round(budget / self.block), 1), place.stripes)

    def _columns(self, head: int, ctx: LayerContext, place: Layout) -> Tensor:
        """bool [blocks after the sinks] that a vertical head reads."""
        found = numbers(next((b for layer, h, b in self.stripes if (layer, h) == (ctx.layer, head)), ""))
        count = place.stripes
        made = self.made_for
        old = count if made is None else Layout.stripes_of(made.grid, self.sinks, self.block)
        if found and found[-1] >= old:
            raise ValueError(
                f"stripes of layer {ctx.layer}, head {head} name block {found[-1]}, but there are {old} blocks of "
                f"{self.block} tokens after {self.sinks} sink frames"
            )
        if not found and not ctx.text and not place.early:
            raise ValueError(
                f"head {head} of layer {ctx.layer} is vertical but reads nothing: give it stripes, or set sinks to 1"
            )
        chosen = torch.zeros(old, dtype=torch.bool)
        chosen[found] = True
        if old in (count, 0):
            return chosen[:count]
        return chosen[((torch.arange(count) + 0.5) * old / count).long().clamp(max=old - 1)]


def token_major(ctx: LayerContext, sinks: int, device: torch.device) -> Tensor:
    """int32 [1, 1, N]: the first ``sinks`` frames, then all frames of one place before the next; text stays."""
    frames, height, width = ctx.grid
    early = min(sinks, frames) * height * width
    index = torch.arange(ctx.num_tokens, dtype=torch.int32, device=device)
    video = index[ctx.video_slice]
    late = video[early:].view(frames - min(sinks, frames), height * width).T.flatten()
    text = index[ctx.text_slice]
    parts = (text, video[:early], late) if ctx.text_first else (video[:early], late, text)
    return torch.cat(parts)[None, None]


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return x if device.type == "cpu" else (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
