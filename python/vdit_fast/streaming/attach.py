"""Self-attention of one transformer over the frames of a chunk and those before it, which a K/V cache holds.

A chunk's forward gets tables of the chunk's own frame numbers, writes its keys and values into the reserved pages and
reads the pages held through a plan over their rows. It is in force during the rollout's own forwards only, so that the
model may be used for anything else between two chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.caching.checks import size
from vdit_fast.models.heads import HeadsCall
from vdit_fast.models.qk import Heads, Norms, Rotary, fused_options, normed, turn
from vdit_fast.models.session import Geometry, Session
from vdit_fast.ops.qk_norm_rope import qk_norm_rope
from vdit_fast.streaming.checks import check_budget, check_fits
from vdit_fast.streaming.families import FrameTables, Tables, rotary_of
from vdit_fast.streaming.kv_cache import KVCache

if TYPE_CHECKING:
    from vdit_fast.context import StepContext
    from vdit_fast.models.base import ServedProcessor

__all__ = ["CachedAttention"]

PLANNED = "streaming: every frame that is held is read"


class CachedAttention:
    """The K/V caches of one transformer, one for each guidance branch, and what reads and writes them.

    Args:
        session: of the accelerated transformer.
        module: the transformer.
        page: tokens of a frame.
        capacity: frames held, the current chunk's included.
        sinks: the first so many frames are never evicted.
        store: "post_rope": keys lie in the cache rotated at their absolute frame numbers, which end with the model's
            table; "pre_rope": keys are turned in every forward to their place among the frames held.
        max_bytes: refuse larger caches (of one branch): bytes, or text such as "8 GB".
        branches: how many there will be, one for each branch of guidance.
    """

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        *,
        page: int,
        capacity: int,
        sinks: int,
        store: str,
        max_bytes: int | str | None = None,
        branches: int = 1,
    ) -> None:
        self.session = session
        self.tables = FrameTables(module)
        self.page = page
        self.settings: dict[str, Any] = {"sinks": sinks, "store": store}
        self.capacity = capacity
        self.branches = branches
        self.max_bytes = None if max_bytes is None else size("max_bytes", max_bytes)
        self.caches: dict[int, KVCache] = {}
        self.chunk = 0
        """Frames of the current chunk."""
        self.end = 0
        """Absolute number of the frame that comes next."""
        self._branch = 0
        self._causal = 0
        self._written: set[int] = set()
        self._stock: Tables | None = None
        self._own: Tables | None = None  # of the chunk, for all its forwards
        self._rotary: tuple[Any, Rotary] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held of keys and values."""
        return sum(cache.nbytes for cache in self.caches.values())

    def fresh(self) -> CachedAttention:
        """For a copied model: none is in force outside of a forward, and inside of one nothing is copied."""
        raise RuntimeError("a transformer cannot be copied while one of its forwards streams a chunk")

    def reserve(self, frames: int) -> None:
        """Take so many frames as the next chunk, in all branches.

        Raises:
            ValueError: they do not fit beside the sinks, or are beyond the model's table.
        """
        for cache in self.caches.values():
            cache.reserve(frames)
        self.chunk = frames
        self.end += frames
        self._own = None

    @contextmanager
    def branch(self, number: int, causal: int = 0) -> Iterator[None]:
        """In force inside: the forward of the current chunk in one guidance branch.

        Args:
            causal: the chunk's frames in blocks of so many, each of which reads itself and what is before it; 0: every
                frame of the chunk reads the whole chunk.

        Raises:
            RuntimeError: something else holds the transformer's keys or positions, or a layer did not come by.
        """
        session = self.session
        if session.exchanged:
            raise RuntimeError(
                "stream: positions or keys of this transformer are exchanged by something else already; switch it off "
                "(handle.positions(None), handle.regions(None)), or end it"
            )
        self._branch, self._causal = number, causal
        self._written.clear()
        pre_rope, whole = self.settings["store"] == "pre_rope", "sequence" not in session.around_heads
        if pre_rope and not whole:
            raise RuntimeError('stream: store="pre_rope" turns whole sequences; use "post_rope" over several ranks')
        session.around_heads["streaming"] = self
        session.positions = self._positions
        session.before_rotation = _gather if pre_rope else _append if whole else None
        try:
            yield
            missing = [ledger.name for ledger in session.layers if ledger.layer not in self._written]
            if missing:
                raise RuntimeError(
                    f"stream: {missing[0]} and {len(missing) - 1} more layers did not run through this package's "
                    "attention, so that the frames before the chunk were not read; see the fallbacks in report()"
                )
        finally:
            del session.around_heads["streaming"]
            session.positions = session.before_rotation = None

    # ------------------------------------------------------------------ inside a forward
    def cache(self, k: Tensor) -> KVCache:
        """The running branch's, made for keys [B, N, Hkv, D] such as these where there is none."""
        found = self.caches.get(self._branch)
        if found is None:
            shape: dict[str, Any] = {"layers": len(self.session.layers), "capacity": self.capacity, "page": self.page}
            shape |= {"batch": k.shape[0], "heads": k.shape[2], "head_dim": k.shape[3]}
            store = self.settings["store"]
            needed = KVCache.bytes(**shape, store=store, dtype=k.dtype)
            if self.max_bytes is not None:
                check_budget(needed, self.max_bytes, shape, store, k.dtype, "cache_frames")
            if not self.caches:
                check_fits(needed, self.branches, shape, store, k.dtype, k.device, "cache_frames")
            with torch.inference_mode(False):
                found = KVCache(
                    **shape,
                    **self.settings,
                    positions="relative" if store == "pre_rope" else "absolute",
                    table=self.tables.limit,
                    dtype=k.dtype,
                    device=k.device,
                )
            found.reserve(self.chunk)
            self.caches[self._branch] = found
        return found

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        cache, layer = self.cache(call.k), call.layer
        if layer not in self._written:  # compiled: ``before_rotation`` has not run
            cache.write(layer, call.k, call.v)
            call.k, call.v = cache.keys_values(layer)
            self._written.add(layer)
        call.plan, call.planned = cache.plan(call.q.shape[1], causal=self._causal), PLANNED
        call.whole = not self._causal
        call.mask = None  # of a model that is causal by its configuration: the chunk's own, which reads all of itself
        return proceed()

    def _positions(self, step: StepContext, geometry: Geometry, stock: Tables) -> Tables | None:
        """The chunk's rotary tables."""
        cache = self.caches.get(self._branch)
        if cache is None and self.chunk != self.end:
            raise RuntimeError("stream: this branch has no earlier frames; run every branch in every chunk")
        self._stock = stock
        ids = tuple(range(self.chunk)) if cache is None else cache.ids()[-self.chunk :]
        if ids == tuple(range(self.chunk)):
            return None
        if self._own is None:
            self._own = self.tables.of(ids, self.page, stock)
        return self._own

    def _of_keys(self, cache: KVCache, in_pages: bool) -> Rotary:
        """The rotation of all keys held: frame after frame, or in the order of their rows."""
        frames = cache.ids()
        if in_pages:
            frames = tuple((cache.table_rows("cpu")[:: self.page] // self.page).tolist())
        if self._rotary is None or self._rotary[0] != frames:
            assert self._stock is not None
            tables = self.tables.of(frames, self.page, self._stock)
            self._rotary = frames, rotary_of(self.session.family, tables)
        return self._rotary[1]

    def append(
        self, processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, across: bool
    ) -> Heads:
        """Norm and RoPE of the chunk, keys and values straight into their pages where one pass can do it."""
        query, key, value = heads
        options = fused_options(processor, query, norms, across)
        if options is None or rotary is None:
            return turn(processor, heads, norms, rotary, across)
        cache, layer = self.cache(key), processor.layer
        turned = cache.append(layer, key, value, q=query, **options, **rotary.arguments())
        assert turned is not None
        self._written.add(layer)
        return turned, *cache.keys_values(layer)

    def gather(
        self, processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, across: bool
    ) -> Heads:
        """The chunk's queries, and all keys held, turned to the places they have now."""
        query, key, value = heads
        if rotary is None:
            raise RuntimeError("stream: this model has no rotary tables to turn kept keys by")
        cache, layer = self.cache(key), processor.layer
        cache.write(layer, key, value)
        self._written.add(layer)
        options = fused_options(processor, query, norms, across)
        if options is not None:
            query, _, _ = qk_norm_rope(query, **_without("k_", options), **rotary.arguments())
            arguments = {**_without("q_", options), **self._of_keys(cache, in_pages=False).arguments()}
            del arguments["rope_start"]
            keys = cache.rotated(layer, **arguments)
        else:
            stored, _ = cache.keys_values(layer)
            query = rotary.stock(normed(query, norms[0], across))
            keys = self._of_keys(cache, in_pages=True).stock(normed(stored, norms[1], across))
        return query, keys, cache.keys_values(layer)[1]


def _without(prefix: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith(prefix)}


def _attached(processor: ServedProcessor) -> CachedAttention:
    found = processor.session.around_heads["streaming"]
    assert isinstance(found, CachedAttention)
    return found


# Functions of the module: a compiled block is then the same for all rollouts.
def _append(processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, across: bool) -> Heads:
    if torch.compiler.is_compiling():  # the operator behind writes what the graph computes
        return turn(processor, heads, norms, rotary, across)
    return _attached(processor).append(processor, heads, norms, rotary, across)


@torch.compiler.disable(reason='store="pre_rope" turns the keys held in every call; compile without fullgraph')
def _gather(processor: ServedProcessor, heads: Heads, norms: Norms, rotary: Rotary | None, across: bool) -> Heads:
    return _attached(processor).gather(processor, heads, norms, rotary, across)
