"""Keys and values of finished frames, beside which the frames that still change attend causally (AR-Diffusion)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vdit_fast.models.heads import HeadsCall
from vdit_fast.models.session import Geometry, Session
from vdit_fast.plan import AttentionPlan
from vdit_fast.plan.memo import remembered
from vdit_fast.streaming.families import FrameTables, Tables
from vdit_fast.streaming.kv_cache import KVCache

if TYPE_CHECKING:
    from vdit_fast.context import StepContext

__all__ = ["KeptFrames", "live_plan"]

PLANNED = "kept frames: every finished frame is read"


def live_plan(kept: int, live: list[int], device: torch.device | str | None = None) -> AttentionPlan:
    """What the rows of a forward read of its frames that still change.

    Args:
        kept: rows before them, of frames that have just finished: they read none of them.
        live: rows of each block of frames that still changes; a block reads itself and the blocks before it.

    Returns:
        a plan of ``kept + sum(live)`` queries and ``sum(live)`` keys.
    """
    count = len(live)
    mask = torch.cat((torch.zeros(1, count, dtype=torch.bool), torch.ones(count, count, dtype=torch.bool).tril()))
    plan = AttentionPlan.from_block_mask(mask, torch.tensor([kept, *live]), torch.tensor(live))
    return plan if device is None else plan.to(device)


class KeptFrames:
    """Keys and values of a clip's finished frames, for each guidance branch of one transformer.

    A frame that has finished runs once more, clean and at timestep 0, beside the frames that still change; its keys and
    values then stay. That is exact where no frame reads a later one, nor any context that does.

    Args:
        session: of the accelerated transformer.
        module: the transformer.
        frames: of the clip.
        block: frames that read each other in full.
    """

    def __init__(self, session: Session, module: nn.Module, frames: int, block: int) -> None:
        self.session = session
        self._tables = FrameTables(module)
        self._total, self._block = frames, block
        self.caches: dict[int, KVCache] = {}
        self.kept = 0
        """Frames whose keys and values are held, those of the running forward included."""
        self._new = 0  # of them, those that the running forward writes
        self._frames = range(0)
        self._branch = 0
        self._written: set[int] = set()
        self._plans: dict[torch.device, AttentionPlan] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held of keys and values."""
        return sum(cache.nbytes for cache in self.caches.values())

    def fresh(self) -> KeptFrames:
        raise RuntimeError("a transformer cannot be copied while one of its forwards keeps frames")

    def take(self, finished: int, end: int) -> range:
        """The frames that the next forwards run on: those that have finished and are not kept yet, and the others up to
        ``end``. ``finished`` counts all that have."""
        self._frames = range(self.kept, end)
        self._new = finished - self.kept
        if self._new:
            for cache in self.caches.values():
                cache.reserve(self._new)
        self.kept = finished
        self._plans.clear()
        return self._frames

    @contextmanager
    def branch(self, number: int) -> Iterator[None]:
        """In force inside: the forward of these frames in one guidance branch."""
        session = self.session
        if session.exchanged:
            raise RuntimeError(
                "kept frames: positions, keys or the causal order of this transformer are exchanged by something else "
                "already; kept frames bring their own order, take the other one off"
            )
        self._branch = number
        self._written.clear()
        session.around_heads["streaming"], session.positions = self, self._positions
        try:
            yield
        finally:
            del session.around_heads["streaming"]
            session.positions = None
        missing = [ledger.name for ledger in session.layers if ledger.layer not in self._written]
        if missing:
            raise RuntimeError(
                f"kept frames: {missing[0]} and {len(missing) - 1} more layers did not run through this package's "
                "attention, so that finished frames were not read; see the fallbacks in report(), and use no cache"
            )

    def _positions(self, step: StepContext, geometry: Geometry, stock: Tables) -> Tables | None:
        """Tables of the frames' own numbers."""
        if self._frames.start == 0:
            return None
        return self._tables.of(self._frames, geometry.grid[1] * geometry.grid[2], stock)

    def __call__(self, call: HeadsCall, proceed: Callable[[], Tensor]) -> Tensor:
        rows, frames = call.k.shape[1], len(self._frames)
        if rows % frames or call.q.shape[1] != rows:
            raise RuntimeError(
                f"kept frames: {call.q.shape[1]} queries and {rows} keys are not {frames} frames; run whole frames"
            )
        page = rows // frames
        new = self._new * page
        if self.kept:
            cache = self._cache(call, page)
            if new:
                cache.write(call.layer, call.k[:, :new], call.v[:, :new])
            call.segments = [*call.segments, cache.keys_values(call.layer)]
        call.k, call.v = call.k[:, new:], call.v[:, new:]
        device, changing = call.q.device, frames - self._new
        live = [min(self._block, changing - first) * page for first in range(0, changing, self._block)]
        call.plan, call.planned = remembered(self._plans, device, lambda: live_plan(new, live, device)), PLANNED
        call.mask = None  # of a model that is causal by its configuration: the same order
        self._written.add(call.layer)
        return proceed()

    def _cache(self, call: HeadsCall, page: int) -> KVCache:
        found = self.caches.get(self._branch)
        if found is None:
            with torch.inference_mode(False):
                found = KVCache(
                    layers=len(self.session.layers),
                    capacity=self._total,
                    page=page,
                    batch=call.k.shape[0],
                    heads=call.k.shape[2],
                    head_dim=call.k.shape[3],
                    table=self._tables.limit,
                    dtype=call.k.dtype,
                    device=call.k.device,
                )
            found.reserve(self.kept)
            self.caches[self._branch] = found
        return found
