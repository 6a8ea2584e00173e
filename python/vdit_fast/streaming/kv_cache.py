"""Keys and values of past frames: a paged ring buffer that is never moved, read through plans over its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdit_fast.caching.checks import choice, count, size
from vdit_fast.ops.attention import attention
from vdit_fast.ops.qk_norm_rope import qk_norm_rope
from vdit_fast.plan import AttentionPlan
from vdit_fast.streaming.checks import (
    as_queries,
    check_budget,
    check_fits,
    check_positions,
    check_rows,
    check_sizes,
    no_gradient,
)
from vdit_fast.streaming.fork import KVFork
from vdit_fast.streaming.pages import POSITIONS, Ring, neighbours, numbered
from vdit_fast.streaming.plans import chunk_plan, token_rows
from vdit_fast.streaming.split_kv import choose_parts, split_attention, split_plan

__all__ = ["STORES", "KVCache"]

STORES = ("post_rope", "pre_rope")


class KVCache:
    """Keys and values of one transformer and one guidance branch, all layers, one page per latent frame.

    A chunk of frames is *reserved* once, which evicts the oldest pages by their numbers and moves no memory; all its
    denoise steps, and the pass over the clean frames after them, then overwrite the same pages (Self Forcing, arXiv
    2506.08009). Attention reads the pages where they lie: ``plan`` counts physical rows. All state but the keys and
    values are integers on the host, so nothing is ever read back from a device, and the memory is allocated once.

    Args:
        layers: attention layers.
        capacity: frames (pages) held, the current chunk's included.
        page: tokens of a frame.
        batch: batch items.
        heads: key/value heads.
        head_dim: channels of a head.
        sinks: the first so many frames are never evicted.
        store: ``"post_rope"``: keys as attention gets them, rotated at the positions they had when they were written;
            ``"pre_rope"``: keys before norm and RoPE, which ``rotated`` brings to the positions they have now.
        positions: a frame's position on the time axis: its ``"absolute"`` number; ``"relative"``: its place among the
            frames held, which never outgrows the capacity (``"pre_rope"`` only); ``"cyclic"``: its number modulo
            ``table`` (ViD-GPT, arXiv 2406.10981).
        table: entries of the model's position table along time; None: any number has a position.
        max_bytes: refuse to allocate more: bytes, or text such as "8 GB".
        dtype, device: of keys and values.

    Raises:
        ValueError: sizes that do not go together, or more bytes than ``max_bytes`` or than the device has.
    """

    def __init__(
        self,
        *,
        layers: int,
        capacity: int,
        page: int,
        batch: int,
        heads: int,
        head_dim: int,
        sinks: int = 0,
        store: str = "post_rope",
        positions: str = "absolute",
        table: int | None = None,
        max_bytes: int | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        shape = {"layers": layers, "capacity": capacity, "page": page, "batch": batch, "heads": heads}
        shape["head_dim"] = head_dim
        check_sizes(shape, sinks, dtype)
        choice("store", store, STORES)
        choice("positions", positions, POSITIONS)
        check_positions(store, positions, table, capacity)
        needed = self.bytes(**shape, store=store, dtype=dtype)
        if max_bytes is not None:
            check_budget(needed, size("max_bytes", max_bytes), shape, store, dtype)
        check_fits(
            needed, 1, shape, store, dtype, torch.device(torch.get_default_device() if device is None else device)
        )
        self.layers, self.capacity, self.page, self.sinks = layers, capacity, page, sinks
        self.batch, self.heads, self.head_dim = batch, heads, head_dim
        self.store, self.positions, self.table = store, positions, table
        self.frozen = False
        self.thaws = 0  # forks of an earlier freeze are void
        self._ring = Ring(capacity, sinks)
        self._memo: dict[Any, Any] = {}
        rows = (batch, capacity * page, heads, head_dim)
        # Zeros: a masked dense fallback multiplies rows that no query reads by 0, and NaN would survive that.
        with torch.inference_mode(False):  # tensors of inference mode could not be written outside of it
            self._k = torch.zeros(layers, *rows, dtype=dtype, device=device)
            self._v = torch.zeros(layers, *rows, dtype=dtype, device=device)
            self._turned = torch.zeros(rows, dtype=dtype, device=device) if store == "pre_rope" else None

    @staticmethod
    def bytes(
        *,
        layers: int,
        capacity: int,
        page: int,
        batch: int,
        heads: int,
        head_dim: int,
        store: str = "post_rope",
        dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        """Bytes of a cache: 2 · layers · batch · capacity · page · heads · head_dim · itemsize, and for
        ``"pre_rope"`` one layer's keys more, the workspace of ``rotated``."""
        tensors = 2 * layers + (store == "pre_rope")
        return tensors * batch * capacity * page * heads * head_dim * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values: ``bytes`` of the same sizes."""
        held = (self._k, self._v) if self._turned is None else (self._k, self._v, self._turned)
        return sum(t.nbytes for t in held)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._k.dtype

    @property
    def device(self) -> torch.device:
        """Of keys and values."""
        return self._k.device

    # ------------------------------------------------------------------ which frames
    @property
    def frames(self) -> tuple[int, ...]:
        """Absolute numbers of the frames held, in attention order: the sinks, then up to the current chunk's last."""
        return self._ring.frames

    @property
    def chunk(self) -> tuple[int, ...]:
        """Absolute numbers of the current chunk's frames."""
        return self._ring.frames[len(self._ring.frames) - self._ring.chunk :]

    @property
    def first(self) -> int:
        """The oldest frame held that is not a sink; ``end`` where there is none."""
        return self._ring.first

    @property
    def end(self) -> int:
        """Absolute number of the next chunk's first frame."""
        return self._ring.end

    def reserve(self, pages: int) -> tuple[int, ...]:
        """Take ``pages`` frames as the current chunk; the oldest frames leave where there is no room.

        Once per chunk, not per denoise step. No memory moves, and what the frames held before is still there until
        ``write``.

        Returns:
            The physical slots of the frames; slot s is rows ``[s * page, (s + 1) * page)``.

        Raises:
            ValueError: the chunk does not fit beside the sinks, or a frame's position is beyond the model's table.
            RuntimeError: the cache is frozen.
        """
        self._writable("reserve")
        count("pages", pages, 1)
        frames, _ = self._ring.after(pages)
        last = max(numbered(frames, self.positions, self.table))
        if self.table is not None and last >= self.table:
            remedy = (
                'positions="relative" never runs out' if self.store == "pre_rope" else
                'store="pre_rope" with relative positions (in SelfForcing: store="pre_rope") never runs out'
            )  # fmt: skip
            raise ValueError(
                f"frame {frames[-1]} has position {last}, but the model's table has {self.table} entries along time; "
                f"{remedy}"
            )
        self._ring.advance(pages)
        self._memo.clear()
        return self._ring.slots[-pages:]

    def ids(self) -> tuple[int, ...]:
        """The position of every frame of ``frames`` on the time axis, as ``positions`` says."""
        return numbered(self.frames, self.positions, self.table)

    def reset(self) -> None:
        """Forget all frames; the next one is number 0. The memory stays."""
        self._writable("reset")
        self._ring.reset()
        self._memo.clear()

    def freeze(self) -> None:
        """From now on every change is an error, until ``thaw``."""
        self.frozen = True

    def thaw(self) -> None:
        """Allow changes again; forks that were made before are void."""
        self.frozen = False
        self.thaws += 1

    def fork(self) -> KVFork:
        """A reader of the frozen prefix for chunks whose keys are not to enter it, such as noisy ones.

        Raises:
            RuntimeError: the cache is not frozen.
        """
        if not self.frozen:
            raise RuntimeError("fork: what is shared must not change; call freeze() first")
        return KVFork(self)

    # ------------------------------------------------------------------ rows and positions as tensors, once per state
    def rows(self, device: torch.device | str | None = None) -> Tensor:
        """Physical row of every token of the current chunk, int32 [tokens]: ``kv_rows`` of ``qk_norm_rope``."""
        self._chunked("rows")
        slots = self._ring.slots[-self._ring.chunk :]
        place = self.device if device is None else torch.device(device)
        return self._once(("rows", place), lambda: token_rows(slots, self.page, place))

    def table_rows(self, device: torch.device | str | None = None, *, chunk: bool = False) -> Tensor:
        """Row of a frame-major position table (``id * page + place``) for every physical row held, int32 [tokens].

        ``chunk``: for the current chunk's tokens in their order instead: ``positions`` of its queries.
        """
        self._chunked("table_rows")
        ids, slots = self.ids(), self._ring.slots
        if chunk:
            numbers = ids[len(ids) - self._ring.chunk :]
        else:
            numbers = tuple(ids[slots.index(slot)] for slot in range(len(slots)))
        place = self.device if device is None else torch.device(device)
        return self._once(("table rows", chunk, place), lambda: token_rows(numbers, self.page, place))

    def plan(self, lq: int, *, causal: int = 0, window: int | None = None) -> AttentionPlan:
        """What the current chunk's queries read, over the physical rows of ``keys_values``; built once per state.

        Args:
            lq: queries. With ``causal`` or ``window`` the chunk's tokens; else any number, all read the same.
            causal: 0: every query reads the whole chunk. n: the chunk is cut into blocks of n frames, a query reads
                the past and the blocks up to its own (True is 1).
            window: a query reads the last so many frames up to the end of its own block, and the sinks; None: all.
        """
        self._chunked("plan")
        key = ("plan", lq, int(causal), window)
        return self._once(key, lambda: chunk_plan(self._ring, self.page, lq, causal, window, self.device))

    # ------------------------------------------------------------------ writing
    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Overwrite the current chunk's pages: k, v [batch, chunk tokens, heads, head_dim] as attention gets them
        (``"post_rope"``) or as the projections give them (``"pre_rope"``)."""
        self._writable("write")
        self._chunked("write")
        tokens = self._ring.chunk * self.page
        self._check(layer, k, v, tokens)
        for index, slot, pages in neighbours(self._ring.slots[-self._ring.chunk :]):
            token, row, rows = index * self.page, slot * self.page, pages * self.page
            for buffer, new in ((self._k, k), (self._v, v)):
                buffer[layer, :, row : row + rows].copy_(new[:, token : token + rows])

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        q: Tensor | None = None,
        **options: Any,
    ) -> Tensor | None:
        """``write`` of keys that norm and RoPE are still to come to, in one pass straight into the pages.

        Args:
            k, v: as the projections give them, [batch, chunk tokens, heads, head_dim].
            cos, sin: the chunk's table; None: no RoPE.
            q: queries [batch, tokens, query heads, head_dim] that the same pass norms and rotates.
            options: further arguments of ``qk_norm_rope``: norm, weights and biases, positions, rounding.

        Returns:
            q as attention gets it, or None.
        """
        self._writable("append")
        self._chunked("append")
        if self.store != "post_rope":
            raise ValueError(
                'append: store is "pre_rope", which keeps keys before norm and RoPE; use write, and rotated to read'
            )
        self._check(layer, k, v, self._ring.chunk * self.page)
        no_gradient(q=q, **options)
        keys, values, rows = self._k[layer], self._v[layer], self.rows(k.device)
        if q is not None:
            return qk_norm_rope(q, k, v, cos=cos, sin=sin, kv_rows=rows, k_out=keys, v_out=values, **options)[0]
        options = as_queries(options)
        qk_norm_rope(k, None, v, cos=cos, sin=sin, q_rows=rows, kv_rows=rows, q_out=keys, v_out=values, **options)
        return None

    def scatter(self, layer: int, k: Tensor, v: Tensor, rows: Tensor) -> None:
        """Overwrite single tokens: k, v [batch, n, heads, head_dim] to physical rows int32 [n], each at most once.

        Rows of the current chunk's tokens are ``cache.rows(device)[tokens]`` (a subset of tokens, arXiv 2502.10389).
        """
        self._writable("scatter")
        self._check(layer, k, v, rows.shape[-1])
        qk_norm_rope(k, None, v, q_rows=rows, kv_rows=rows, q_out=self._k[layer], v_out=self._v[layer])

    # ------------------------------------------------------------------ reading
    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the pages held, [batch, held tokens, heads, head_dim], in physical order: what ``plan`` counts."""
        self._layer(layer)
        held = len(self._ring.frames) * self.page
        return self._k[layer, :, :held], self._v[layer, :, :held]

    def ordered(self, layer: int) -> tuple[Tensor, Tensor]:
        """``keys_values`` in attention order, for what knows no plan; copies once the ring has wrapped around."""
        keys, values = self.keys_values(layer)
        if self._ring.slots == tuple(range(len(self._ring.slots))):
            return keys, values
        rows = self._once("order", lambda: token_rows(self._ring.slots, self.page, self.device))
        return keys.index_select(1, rows), values.index_select(1, rows)

    def rotated(self, layer: int, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
        """The layer's keys after norm and RoPE at the positions they have now: a view of the workspace that all layers
        share, so read it before the next layer's; one pass over the pages held.

        Args:
            cos, sin: a frame-major table, row ``id * page + place``, for all ids of ``ids()``.
            options: further arguments of ``qk_norm_rope`` that concern keys: norm, k_weight, k_bias, eps, rounding.
        """
        if self._turned is None:
            raise ValueError('rotated: store is "post_rope", whose keys are rotated already; read keys_values')
        keys, _ = self.keys_values(layer)
        turned = self._turned[:, : keys.shape[1]]
        no_gradient(**options)
        options = as_queries(options)
        qk_norm_rope(keys, cos=cos, sin=sin, positions=self.table_rows(keys.device), q_out=turned, **options)
        return turned

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        keys: Tensor | None = None,
        causal: int = 0,
        window: int | None = None,
        scale: float | None = None,
        segments: Sequence[tuple[Tensor, Tensor]] | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the current chunk's queries q [batch, tokens, query heads, head_dim] over what ``plan`` says.

        Args:
            keys: what ``rotated`` returned, for ``"pre_rope"``.
            causal, window: of ``plan``.
            scale, segments, return_lse: of ``vdit_fast.attention``.
        """
        stored, values = self.keys_values(layer)
        self.check_keys("attend", keys)
        plan = self.plan(q.shape[1], causal=causal, window=window)
        keys = stored if keys is None else keys
        parts = 1 if segments else choose_parts(q, keys)
        if parts == 1:
            return attention(q, keys, values, plan, scale=scale, segments=segments, return_lse=return_lse)
        split = self._once(("split", id(plan), parts), lambda: split_plan(plan, parts, self.batch))
        return split_attention(q, keys, values, plan, parts=parts, split=split, scale=scale, return_lse=return_lse)

    # ------------------------------------------------------------------ checks
    def check_keys(self, what: str, keys: Tensor | None) -> None:
        """Raise ValueError unless keys come where, and only where, the stored ones are not what attention reads."""
        if (keys is None) != (self.store == "post_rope"):
            need = "keys=cache.rotated(...)" if keys is None else "no keys, they are read where they lie"
            raise ValueError(f"{what}: store is {self.store!r}; pass {need}")

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _writable(self, what: str) -> None:
        if self.frozen:
            raise RuntimeError(f"{what}: the cache is frozen; call thaw() first, or read it only")

    def _chunked(self, what: str) -> None:
        if not self._ring.chunk:
            raise RuntimeError(f"{what}: no chunk is reserved; call reserve(pages) first")

    def _layer(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise IndexError(f"layer is {layer!r}; the cache has layers 0 to {self.layers - 1}")

    def _check(self, layer: int, k: Tensor, v: Tensor, tokens: int) -> None:
        self._layer(layer)
        shape = (self.batch, tokens, self.heads, self.head_dim)
        check_rows(k, v, shape, self._k, f"the current chunk has {self._ring.chunk} frames of {self.page} tokens")
