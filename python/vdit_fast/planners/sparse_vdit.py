"""Sparse-vDiT: a static table gives every head its mode (full, skip, diagonal, multi-diagonal, vertical stripes)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import _checks
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
        sparsity: fraction of the pairs that the modes d, m and v drop, in [0, 1); 0 drops nothing in a band.
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
        self._check_heads(q.shape[2])  # also where the call stays dense
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
        self._check_heads(heads)
        key = ("sparse_vdit plan", self, ctx.layer, ctx.step.expert, ctx.step.frame_block)
        content = (row, tuple(ctx.grid), ctx.text, ctx.text_first, heads, q.device)
        known = ctx.state.get(key)
        if known is None or known[0] != content:
            with torch.inference_mode(False):
                known = ctx.state[key] = (content, self.runs(row, heads, ctx, q.device))
        return self.in_order(known[1], row, ctx)

    def runs(self, row: str, heads: int, ctx: LayerContext, device: torch.device) -> AttentionPlan:
        """The plan of a row of letters, still without the heads' token orders.

        The table is host data, so the lists are made on the host, in their exact length, and copied without waiting.
        """
        from ..plan.builders import compile_map

        place = Layout(self, ctx)
        shared = len(set(row)) == 1 and "v" not in row
        letters = row[0] if shared else row * heads if len(row) == 1 else row
        rows = [self._head(letter, head, ctx, place) for head, letter in enumerate(letters)]
        keep = torch.stack([keep for keep, _ in rows])[None]
        q_len = torch.stack([lengths for _, lengths in rows])
        plan = compile_map(keep, q_len, place.kv_len[None], place.tokens, place.tokens)
        if device.type == "cpu":
            return plan
        parts = {name: getattr(plan, name) for name in ("tiles", "run_ptr", "runs")}
        if device.type == "cuda":
            parts = {name: part.pin_memory() for name, part in parts.items()}
        return replace(plan, **{name: part.to(device, non_blocking=True) for name, part in parts.items()})

    def in_order(self, plan: AttentionPlan, row: str, ctx: LayerContext) -> AttentionPlan:
        """The plan with its token orders, one for all heads where they agree. Made at each call, as they are large."""
        if "m" not in row:
            return plan
        key = ("sparse_vdit orders", self.sinks, tuple(ctx.grid), ctx.text, ctx.text_first, plan.device)
        if key not in ctx.state:
            with torch.inference_mode(False):
                ctx.state[key] = token_major(ctx, 0, plan.device), token_major(ctx, self.sinks, plan.device)
        q_order, kv_order = ctx.state[key]
        if set(row) - {"m", "s"}:
            mask = ("sparse_vdit token-major heads", row, plan.device)
            if mask not in ctx.state:
                with torch.inference_mode(False):
                    flags = torch.tensor([letter == "m" for letter in row])
                    ctx.state[mask] = flags.to(plan.device)[None, :, None]
            same = torch.arange(plan.lq, dtype=torch.int32, device=plan.device)
            q_order, kv_order = (torch.where(ctx.state[mask], order, same) for order in (q_order, kv_order))
        return replace(plan, q_order=q_order, kv_order=kv_order)

    def _head(self, letter: str, head: int, ctx: LayerContext, place: Layout) -> tuple[Tensor, Tensor]:
        """What one head reads: bool [q blocks, kv blocks] and its q block lengths."""
        if letter == "s":
            return place.nothing(), place.q_whole
        if letter == "f":
            return place.complete(None), place.q_whole
        if letter == "v":
            return place.complete(self._columns(head, ctx, place).expand(place.blocks, -1)), place.q_whole
        return place.complete(place.band(self.width(ctx), token_major=letter == "m")), place.q_len

    def width(self, ctx: LayerContext) -> float:
        """Half the width of the band in tokens."""
        return band_width(self.sparsity, ctx)

    def stripe_count(self, ctx: LayerContext) -> int:
        """How many blocks besides text and sinks a vertical head reads for the sparsity."""
        place = Layout(self, ctx)
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


class Layout:
    """Blocks of one call's tokens: text, sink frames, and the rest of the video, on the host.

    Attributes:
        early, late: video tokens in the sink frames, and after them; stripes: blocks of the latter.
        q_len, kv_len: int64 block lengths of the whole sequence; q_whole: the same with one block for all of the video.
    """

    def __init__(self, planner: SparseVDiT, ctx: LayerContext) -> None:
        frames, height, width = ctx.grid
        self.frames, self.sinks = frames, min(planner.sinks, frames)
        self.tokens, self.block = ctx.num_tokens, planner.block
        self.early = self.sinks * height * width
        self.late = ctx.n_video - self.early
        self.stripes = self.stripes_of(ctx.grid, planner.sinks, planner.block)
        self._text, self._first = int(ctx.text > 0), ctx.text_first
        self._q, self._k = (_pieces(n, planner.block) for n in (ctx.n_video, self.late))
        self.blocks = len(self._q)
        whole = torch.zeros_like(self._q)
        whole[0] = ctx.n_video
        early = torch.tensor([self.early])
        text = torch.tensor([ctx.text] * self._text)
        video = (self._q, whole, torch.cat([early, self._k]))
        sides = [(text, x) if ctx.text_first else (x, text) for x in video]
        self.q_len, self.q_whole, self.kv_len = (torch.cat(parts).long() for parts in sides)

    @staticmethod
    def stripes_of(grid: tuple[int, int, int], sinks: int, block: int) -> int:
        """Number of blocks after the sink frames."""
        return -(-max(grid[0] - sinks, 0) * grid[1] * grid[2] // block)

    def nothing(self) -> Tensor:
        """bool [q blocks, kv blocks] of a head that reads no key."""
        return torch.zeros(len(self.q_len), len(self.kv_len), dtype=torch.bool)

    def complete(self, late: Tensor | None) -> Tensor:
        """bool [q blocks, kv blocks] from what the video reads of the blocks after the sinks (None: all of them)."""
        keep = torch.ones(len(self.q_len), len(self.kv_len), dtype=torch.bool)
        if late is not None:
            first = self._text if self._first else 0
            keep[first : first + self.blocks, first + 1 : first + 1 + self.stripes] = late
        return keep

    def band(self, width: float, *, token_major: bool) -> Tensor:
        """bool [video q blocks, blocks after the sinks]: centres at most ``width`` tokens apart, or overlapping.

        Token-major keys lack the sink frames, so a place has fewer of them than queries: positions are scaled.
        """
        scale = self.frames / max(self.frames - self.sinks, 1) if token_major else 1.0
        q_end = self._q.cumsum(0).double()
        k_end = self._k.cumsum(0).double() * scale + (0 if token_major else self.early)
        q_start, k_start = q_end - self._q, k_end - self._k * scale
        near = ((q_start + q_end)[:, None] - (k_start + k_end)).abs() <= 2 * width + 1e-6
        return near | ((q_start[:, None] < k_end) & (k_start < q_end[:, None]))


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


def _pieces(length: int, block: int) -> Tensor:
    """Lengths of equal blocks and a shorter tail."""
    return torch.tensor([min(block, length - start) for start in range(0, length, block)], dtype=torch.long)
