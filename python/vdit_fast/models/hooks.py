"""Functions of the user at a transformer's attention and blocks: where they are called, and what they see.

All places lie outside what permutes tokens: rows come in the model's own order, whatever a planner does inside.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.context import StepContext
from vdit_fast.models.blocks import AroundForward, Block, BlockCall, streams, transformer_blocks, with_streams
from vdit_fast.models.forward import Forward
from vdit_fast.models.geometry import Geometry, level_grid

if TYPE_CHECKING:
    from vdit_fast.models.base import ModelAdapter
    from vdit_fast.models.session import Session
    from vdit_fast.plan import AttentionPlan

__all__ = ["WHERE", "Entry", "HookFn", "HookPlace", "HookRows", "Hooks", "attach", "candidates", "choose", "detach"]

WHERE = ("attention_input", "attention_heads", "attention_output", "block_output")
"""Before an attention module; after the softmax, before its output projection; after the module; after a block."""


@dataclass(frozen=True)
class HookPlace:
    """Where in a transformer a hook is called."""

    where: str
    """One of ``WHERE``."""
    index: int
    """Place among the transformer's blocks, or among its hookable attention modules, in the order they are made."""
    count: int
    """Number of those."""
    name: str
    """Module path inside the transformer."""
    over: str = "video"
    """What one sequence holds: "video" (all tokens), "frames" (of one place), "frame" (one frame's tokens)."""
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) in tokens, None when unknown. A UNet's levels have grids of their own."""
    geometry: Geometry | None = None
    """Layout of the joint sequence of a "video" layer, None when unknown."""
    family: str = ""
    """The model family."""
    expert: str = "transformer"
    """Which of a pipeline's transformers."""


@dataclass(frozen=True)
class HookRows:
    """The rows at one place; not to be written to. A place without a second stream has None for it."""

    video: Tensor
    """[B, N, C] in the order of the token grid (Framepack's earlier clips left out). At "attention_heads" and in
    Lumina-Next [B, N, H, D]. Factorised layers: [B · places, frames, C], or [B · frames, places, C]."""
    context: Tensor | None = None
    """Rows of the stream beside the video: text, in LTX-2's blocks audio."""
    video_input: Tensor | None = None
    """What the attention module or block was given: for attention after norm and modulation. None before it ran."""
    context_input: Tensor | None = None
    _again: Callable[[AttentionPlan | None], HookRows] | None = None

    def attend(self, plan: AttentionPlan | None) -> HookRows:
        """The same queries, keys and values over another plan; at "attention_heads" only.

        Args:
            plan: of the joint sequence in the model's order (``HookPlace.geometry``); None is dense.
        """
        if self._again is None:
            raise RuntimeError("attend: queries, keys and values are known at 'attention_heads' only")
        return self._again(plan)


HookAnswer = Tensor | tuple[Tensor | None, Tensor | None] | None
HookFn = Callable[[StepContext, HookPlace, HookRows], HookAnswer]
"""What ``Handle.hook`` takes."""


@dataclass(eq=False)
class Entry:
    """One hook of one transformer."""

    where: str
    fn: HookFn
    chosen: frozenset[int]
    """Indices of the places it is called at."""


@dataclass(frozen=True)
class Site:
    """One attention module that may be hooked."""

    index: int
    layer: int
    """Its number among the served layers."""
    name: str
    over: str


class Hooks:
    """The hooks of one transformer."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.sites: dict[int, Site] = {}
        """Hookable attention modules by their number among the served layers."""
        self.calls: Counter[str] = Counter()

    def fresh(self) -> Hooks:
        """The same functions without records, for a copied model."""
        new = Hooks()
        new.entries, new.sites = list(self.entries), dict(self.sites)
        return new

    def at(self, where: str, index: int) -> list[Entry]:
        """The entries to call at a place, in the order they were made."""
        return [entry for entry in self.entries if entry.where == where and index in entry.chosen]

    def at_heads(self, layer: int) -> bool:
        """Whether a hook waits behind the softmax of a served layer."""
        site = self.sites.get(layer)
        return site is not None and bool(self.at("attention_heads", site.index))

    # Decisions of a hook change from step to step: no part of a compiled graph.
    @torch.compiler.disable
    def run(self, step: StepContext, place: HookPlace, rows: HookRows) -> HookRows:
        """The rows after all hooks of a place; the same object when none changed them."""
        for entry in self.at(place.where, place.index):
            self.calls[place.where] += 1
            try:
                answer = entry.fn(step, place, rows)
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11 and later
                    error.add_note(f"in a hook at {place.where!r} of {place.name}, step {step.step}")
                raise
            rows = _updated(rows, answer, place)
        return rows

    def heads(
        self,
        session: Session,
        forward: Forward | None,
        layer: int,
        out: Tensor,
        again: Callable[[AttentionPlan | None], Tensor],
    ) -> Tensor:
        """Attention's result [B, N, H, D] in the model's order after the hooks behind the softmax."""
        site = self.sites[layer]
        place = _attention_place("attention_heads", session, forward, site, out)
        video, context = _parts(place, out)
        if place.geometry is not None:
            text = 0 if context is None else context.stop - context.start
            place = replace(place, geometry=replace(place.geometry, text=text))

        def attend(plan: AttentionPlan | None) -> HookRows:
            other = again(plan)
            return HookRows(other[:, video], None if context is None else other[:, context], _again=attend)

        rows = HookRows(out[:, video], None if context is None else out[:, context], _again=attend)
        new = self.run(_step(forward), place, rows)
        if new is rows:
            return out
        out = _put(out, video, new.video)
        return out if context is None or new.context is rows.context else _put(out, context, new.context)


def _updated(rows: HookRows, answer: HookAnswer, place: HookPlace) -> HookRows:
    if answer is None:
        return rows
    pair = (answer, None) if isinstance(answer, Tensor) else answer
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(
            f"hook at {place.where!r} of {place.name}: return new video rows, (video, context) or None, "
            f"got {type(answer).__name__}"
        )
    for label, new in zip(("video", "context"), pair, strict=True):
        old = getattr(rows, label)
        if new is None or new is old:
            continue
        fits = isinstance(new, Tensor) and old is not None
        if not fits or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            have = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            want = "None: this place has no such rows" if old is None else f"{old.dtype} {list(old.shape)}"
            raise ValueError(f"hook at {place.where!r} of {place.name}: {label} rows are {have}, expected {want}")
        changes: dict[str, Any] = {label: new}
        rows = replace(rows, **changes)
    return rows


def _put(x: Tensor, where: slice, new: Tensor | None) -> Tensor:
    """x [B, N, ...] with the rows of a slice exchanged."""
    if new is None:
        return x
    pieces = [piece for piece in (x[:, : where.start], new, x[:, where.stop :]) if piece.shape[1]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _step(forward: Forward | None) -> StepContext:
    return forward.step if forward is not None else StepContext()


def _attention_place(where: str, session: Session, forward: Forward | None, site: Site, x: Tensor) -> HookPlace:
    geometry = _geometry(forward, x, where) if site.over == "video" else None
    grid = geometry.grid if geometry is not None else None
    if site.over != "video" and forward is not None:
        grid = level_grid(forward.volume, site.over, x.shape[0], x.shape[1])
    count = len(session.hooks.sites)
    expert = _step(forward).expert if forward is not None else session.expert
    return HookPlace(where, site.index, count, site.name, site.over, grid, geometry, session.family, expert)


def _geometry(forward: Forward | None, x: Tensor, where: str) -> Geometry | None:
    """The layout of the tokens, None where the video's rows x [B, N, ...] are not as many (behind the softmax the joint
    sequence is looked at later)."""
    geometry = forward.geometry if forward is not None else None
    if geometry is None or where == "attention_heads":
        return geometry
    return geometry if x.shape[1] in (geometry.n_video, geometry.history + geometry.n_video) else None


def _parts(place: HookPlace, x: Tensor) -> tuple[slice, slice | None]:
    """Where video and text lie in attention's joint sequence x [B, N, H, D]."""
    whole = x.shape[1]
    if place.over != "video":
        return slice(0, whole), None
    geometry = place.geometry
    text = -1 if geometry is None else whole - geometry.n_video - geometry.history
    if geometry is None or text < 0 or geometry.text not in (None, text):
        raise RuntimeError(
            f"hook at {place.where!r} of {place.name}: the {whole:,} rows cannot be told apart, the token grid is "
            f"{'unknown' if geometry is None else geometry.grid}; run the whole transformer"
        )
    first = geometry.history + (text if geometry.text_first else 0)
    video = slice(first, first + geometry.n_video)
    if text == 0:
        return video, None
    return video, slice(0, text) if geometry.text_first else slice(whole - text, whole)


def _video(geometry: Geometry | None, x: Tensor) -> slice:
    """The video's rows in a stream of its own, which Framepack begins with earlier clips."""
    history = geometry.history if geometry is not None else 0
    held = geometry is not None and history and x.shape[1] == history + geometry.n_video
    return slice(history if held else 0, x.shape[1])


def _running(session: Session, arguments: dict[str, Any]) -> Forward | None:
    """The forward a call belongs to; under gradient checkpointing a tensor made once per forward tells."""
    tensors = (item for value in arguments.values() for item in (value if isinstance(value, tuple) else (value,)))
    return session.forward_among(item for item in tensors if isinstance(item, Tensor))


class BlockHooks:
    """Stands around blocks and calls what is hooked to their outputs."""

    @torch.compiler.disable(recursive=False)
    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        session, block = call.session, call.block
        if not session.hooks.at("block_output", block.index):
            return proceed()
        inputs = call.inputs
        output = proceed()
        forward = _running(session, call.arguments)
        geometry = _geometry(forward, streams(output)[0], "block_output")
        grid, step = (geometry.grid if geometry is not None else None), _step(forward)
        place = HookPlace(
            "block_output", block.index, block.count, block.name, "video", grid, geometry, session.family, step.expert
        )
        return _around_output(session.hooks, step, place, output, inputs)

    def fresh(self) -> BlockHooks:
        return BlockHooks()


class AttentionHooks:
    """Stands around attention modules and calls what is hooked to their inputs and outputs."""

    @torch.compiler.disable(recursive=False)
    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        session, index = call.session, call.block.index
        hooks = session.hooks
        before, after = hooks.at("attention_input", index), hooks.at("attention_output", index)
        if not before and not after:
            return proceed()
        site = next(site for site in hooks.sites.values() if site.index == index)
        forward = _running(session, call.arguments)
        place = _attention_place("attention_input", session, forward, site, call.arguments["hidden_states"])
        if before:
            self._change_input(hooks, _step(forward), place, call)
        inputs = call.inputs
        output = proceed()
        place = replace(place, where="attention_output")
        return _around_output(hooks, _step(forward), place, output, inputs) if after else output

    @staticmethod
    def _change_input(hooks: Hooks, step: StepContext, place: HookPlace, call: BlockCall) -> None:
        first, second = call.block.streams
        x, context = call.inputs
        assert x is not None
        twice = context is x  # Lumina-Next says by this that keys come from the same rows
        video = _video(place.geometry, x)
        rows = HookRows(x[:, video], None if twice else context)
        new = hooks.run(step, place, rows)
        if new.video is not rows.video:
            call.arguments[first] = _put(x, video, new.video)
            if twice:
                call.arguments[second] = call.arguments[first]
        if new.context is not rows.context:
            call.arguments[second] = new.context

    def fresh(self) -> AttentionHooks:
        return AttentionHooks()


def _around_output(
    hooks: Hooks, step: StepContext, place: HookPlace, output: Any, inputs: Sequence[Tensor | None]
) -> Any:
    """A module's output after the hooks, in the module's own form."""
    found = streams(output)
    x = found[0]
    context = found[1] if len(found) > 1 else None
    video = _video(place.geometry, x)
    given = inputs[0]
    rows = HookRows(
        x[:, video],
        context,
        None if given is None else given[:, _video(place.geometry, given)],
        inputs[1] if context is not None and len(inputs) > 1 else None,
    )
    new = hooks.run(step, place, rows)
    if new is rows:
        return output
    changed = [x if new.video is rows.video else _put(x, video, new.video), *found[1:]]
    if context is not None and new.context is not None:
        changed[1] = new.context
    return with_streams(output, changed)


def candidates(root: nn.Module, session: Session, adapter: ModelAdapter, where: str) -> list[tuple[int, str]]:
    """(index, module path) of everything that may be hooked at a place of this kind."""
    if where == "block_output":
        return [(index, name) for index, (name, _) in enumerate(transformer_blocks(root, adapter))]
    hooks = session.hooks
    if not hooks.sites:
        for ledger in session.layers:
            over = adapter.attends_over(ledger.name, root.get_submodule(ledger.name))
            if over is not None:
                hooks.sites[ledger.layer] = Site(len(hooks.sites), ledger.layer, ledger.name, over)
    return [(site.index, site.name) for site in hooks.sites.values()]


def choose(found: Sequence[tuple[int, str]], layers: Any) -> frozenset[int]:
    """The indices that ``layers`` of ``Handle.hook`` means."""
    if layers is None:
        return frozenset(index for index, _ in found)
    wanted = [layers] if isinstance(layers, int | str) else layers
    if not isinstance(wanted, Iterable):
        raise TypeError(f"layers must be indices or patterns of module paths, or None, got {type(layers).__name__}")
    chosen: set[int] = set()
    for item in wanted:
        if isinstance(item, str):
            chosen |= {index for index, name in found if fnmatch.fnmatchcase(name, item)}
        elif isinstance(item, int) and not isinstance(item, bool):
            chosen |= {item % len(found)} if found and -len(found) <= item < len(found) else set()
        else:
            raise TypeError(f"layers must hold integers and patterns of module paths, got {item!r}")
    return frozenset(chosen)


def attach(root: nn.Module, session: Session) -> None:
    """Let ``session.around_attention`` stand around the hookable attention modules."""
    sites = session.hooks.sites
    for site in sites.values():
        block = Block(site.index, len(sites), site.name)
        AroundForward(root.get_submodule(site.name), block, session, root, "around_attention").attach()


def detach(root: nn.Module, session: Session) -> None:
    """Undoes ``attach``."""
    for module in root.modules():  # a site may be gone
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, AroundForward) and wrapper.of(session):
            wrapper.detach()
