"""One rank's part of a transformer: its own forward, in which only this rank's blocks run.

On every rank the transformer is called as always, so that step, grid, planners and caches work as they do alone.
The stream that was received comes in the place of the embedded latents, blocks of ranks before this one pass it on
unseen, and the forward ends behind the last own one. What lies before the blocks and sees no latents (embeddings of the
timestep and the text) is made once per step of the schedule, on the first rank, and handed to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.forwards import ForwardStandIn
from vdit_fast.models.blocks import BlockCall, transformer_blocks
from vdit_fast.models.session import Session
from vdit_fast.parallel.neighbours import NeighbourKeys
from vdit_fast.parallel.nests import mapped
from vdit_fast.parallel.refusals import staged_root
from vdit_fast.parallel.schedule import Item

if TYPE_CHECKING:
    from vdit_fast.handle import Handle

__all__ = ["Conditions", "Stage"]

Conditions = list[dict[str, list[Any]]]
"""Per step of the schedule: path of an embedder -> what its calls returned."""


class _Handover(Exception):
    """Ends a transformer's forward behind the last block of this rank."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("the forward goes on on the next rank")
        self.stream = stream


class _Embedder(ForwardStandIn):
    """Stands in for ``forward`` of a module before the blocks."""

    def __init__(self, module: nn.Module, session: Session, path: str, stage: Stage) -> None:
        super().__init__(module, session)
        self._path = path
        self._stage = stage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._session.active:
            return self.inner(*args, **kwargs)
        return self._stage.embed(self._path, lambda: self.inner(*args, **kwargs))


class Stage:
    """The blocks ``layers`` of an accelerated transformer, and what lies before the first and behind the last.

    Args:
        handle: of the transformer.
        layers: which of its blocks run here.

    Raises:
        RuntimeError: the transformer cannot be split, or not with this configuration; the message says why.
    """

    def __init__(self, handle: Handle, layers: range) -> None:
        self.root, self.layout = staged_root(handle)
        module = self.root.module()
        assert module is not None
        self.handle = handle
        self.module: Any = module
        self.layers = layers
        self._blocks = transformer_blocks(module, self.root.adapter)
        self.first, self.last = layers.start == 0, layers.stop == len(self._blocks)
        own = next(self._blocks[layers.start][1].parameters())
        self.device = own.device
        self.dtype: torch.dtype = getattr(module, "dtype", own.dtype)
        self.neighbours: NeighbourKeys | None = None
        self._running = False
        self._received: Tensor | None = None
        self._replayed: dict[str, list[Any]] = {}
        self._recorded: dict[str, list[Any]] | None = None
        self._conditions: Conditions = []
        self._timesteps: Sequence[float] = ()
        self._arguments: dict[str, Any] = {}
        self._shape: tuple[int, ...] = ()
        self._embedders = []
        for path in self._outside():
            stand_in = _Embedder(module.get_submodule(path), self.session, path, self)
            stand_in.attach()
            self._embedders.append(stand_in)
        self.session.around["stage"] = self
        self.root.rehook()

    @property
    def session(self) -> Session:
        return self.root.session

    @property
    def elsewhere(self) -> int:
        """Number of attention layers in blocks of other ranks."""
        return sum(not self.needs(layer.name) for layer in self.session.layers)

    def fresh(self) -> Any:
        return _Copied()

    def close(self) -> None:
        """Take everything off the transformer; weights that were released stay so."""
        for stand_in in self._embedders:
            stand_in.detach()
        if self.session.around.get("stage") is self:
            del self.session.around["stage"]
        self._forget_neighbours()
        self.root.rehook()

    def _forget_neighbours(self) -> None:
        if self.neighbours is not None and self.session.around_heads.get("streaming") is self.neighbours:
            del self.session.around_heads["streaming"]
            self.session.before_rotation = None
        self.neighbours = None

    # ------------------------------------------------------------------ weights
    def _outside(self) -> list[str]:
        paths = (self.layout.patch, *self.layout.embedders)
        return [path for path in paths if getattr(self.module, path, None) is not None]

    def needs(self, name: str) -> bool:
        """Whether this rank uses a parameter of the transformer: those of its blocks, on the first rank the embeddings,
        on the last one what is behind the blocks."""
        for index, (path, _) in enumerate(self._blocks):
            if name.startswith(f"{path}."):
                return index in self.layers
        return self.first if name.startswith(tuple(f"{path}." for path in self._outside())) else self.last

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters that the transformer holds here now."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters() if p.device.type != "meta")

    def release(self) -> None:
        """Give up the weights that this rank does not need; the transformer works in this pipeline only from then
        on."""
        for name, parameter in list(self.module.named_parameters()):
            if not self.needs(name):
                path, _, leaf = name.rpartition(".")
                new = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                self.module.get_submodule(path)._parameters[leaf] = new

    # ------------------------------------------------------------------ before the blocks
    def record(
        self, timesteps: Sequence[float], arguments: dict[str, Any], shape: tuple[int, ...]
    ) -> tuple[Conditions, Tensor]:
        """What the embedders return at every timestep, on the CPU, and the stream before the first block on "meta".

        Args:
            arguments: constant ones of the transformer's forward by name.
            shape: [B, C, F, H, W] of the latents in a pass.
        """
        conditions: Conditions = []
        stream = torch.empty(0)
        latents = torch.zeros(1, dtype=self.dtype, device=self.device).expand(shape)
        for timestep in timesteps:
            self._recorded = {}
            try:
                with torch.no_grad():  # and without hooks: this is no step of anybody's schedule
                    type(self.module).forward(self.module, **self._named(latents, timestep, shape[0], arguments))
            except _Handover as handover:
                stream = handover.stream.to("meta")
            finally:
                recorded, self._recorded = self._recorded, None
            conditions.append(_shared(recorded, conditions[-1] if conditions else None))
        return conditions, stream

    def load(
        self,
        conditions: Conditions,
        timesteps: Sequence[float],
        arguments: dict[str, Any],
        shape: tuple[int, ...],
        num_cat: int,
    ) -> None:
        """Get ready for a run: what ``record`` returned and was called with, and the latent frames that blocks see of
        their noisier neighbour."""
        known: dict[int, Tensor] = {}
        self._conditions = mapped(conditions, lambda x: known.setdefault(id(x), x.to(self.device)))
        self._arguments = mapped(arguments, lambda x: x.to(self.device))
        self._timesteps, self._shape = timesteps, shape
        self.handle.reset()  # an earlier run may have been left with blocks under way
        self._forget_neighbours()
        if num_cat:
            longer = (*shape[:2], shape[2] + num_cat, *shape[3:])
            tokens, after = self._tokens(shape), self._tokens(longer)
            placeholder = torch.empty(1, dtype=self.dtype, device=self.device).expand(longer)
            rotary = self.layout.later_rotary(self.module, placeholder, tokens)
            names = tuple(f"{self._blocks[index][0]}." for index in self.layers)
            layers = [i for i, layer in enumerate(self.session.layers) if layer.name.startswith(names)]
            self.neighbours = NeighbourKeys(after - tokens, rotary, frozenset(layers))
            self.session.around_heads["streaming"] = self.neighbours
            self.session.before_rotation = self.neighbours.rotate

    def _grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        latents = torch.empty(1, device="meta").expand(tuple(shape))
        geometry = self.root.adapter.geometry(self.module, {"hidden_states": latents})
        assert geometry is not None
        return geometry.grid

    def _tokens(self, shape: Sequence[int]) -> int:
        frames, height, width = self._grid(shape)
        return frames * height * width

    def embed(self, path: str, inner: Callable[[], Any]) -> Any:
        """What a module before the blocks returns."""
        if self._recorded is not None:
            if path == self.layout.patch:
                return inner()
            out = inner()
            self._recorded.setdefault(path, []).append(mapped(out, lambda x: x.detach().cpu()))
            return out
        if not self._running or (path == self.layout.patch and self.first):
            return inner()
        if path == self.layout.patch:
            assert self._received is not None
            return self.layout.patched(self._received, self._grid(self._shape))
        return self._replayed[path].pop(0)

    # ------------------------------------------------------------------ one pass
    def run(self, x: Tensor, item: Item, newest: bool, start: int) -> Tensor:
        """One pass of a frame block through this rank.

        Args:
            x: the latents in fp32 [1, C, F, H, W] on the first rank, else the stream [B, N, C] of the rank before.
            newest: the block is the noisiest of its iteration.
            start: latent frames before the block's own ones.

        Returns:
            the stream behind the last own block, or on the last rank the transformer's output [B, C, F, H, W].
        """
        batch, timestep = self._shape[0], self._timesteps[item.step]
        if self.first:
            latents = x.to(self.dtype).expand(self._shape)
        else:
            latents = torch.empty(1, dtype=self.dtype, device=self.device).expand(self._shape)
            self._received = x
        self._replayed = {path: list(calls) for path, calls in self._conditions[item.step].items()}
        if self.neighbours is not None:
            rows = self._tokens((*self._shape[:2], start, *self._shape[3:])) if start else 0
            self.neighbours.begin(rows, newest)
        step = self.handle.step(
            item.step, timestep=timestep, branch=0, num_steps=len(self._timesteps), frame_block=item.block
        )
        self._running = True
        try:
            with torch.no_grad(), step:
                out: Tensor = self.module(**self._named(latents, timestep, batch, self._arguments))[0]
        except _Handover as handover:
            out = handover.stream
        finally:
            self._running, self._received = False, None
        if self.neighbours is not None:
            self.neighbours.end()
        if item.step == len(self._timesteps) - 1:
            self.session.release(item.block)
        return out

    def rest(self) -> None:
        """A run is over: release what planners and the cache remember of blocks that were left under way."""
        self.session.state.clear()
        self.session.cache.forget()

    def _named(self, latents: Tensor, timestep: float, batch: int, arguments: dict[str, Any]) -> dict[str, Any]:
        t = torch.full((batch,), timestep, dtype=torch.float32, device=self.device)
        return {"hidden_states": latents, "timestep": t, **arguments, "return_dict": False}

    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        stream = call.block.streams[0]
        if self._recorded is not None:
            raise _Handover(call.arguments[stream])
        if not self._running:
            return proceed()
        index = call.block.index
        if index < self.layers.start:
            return call.arguments[stream]
        out = proceed()
        if index == self.layers.stop - 1 and not self.last:
            raise _Handover(out)
        return out


class _Copied:
    """Stands where a stage stood in a transformer that was copied."""

    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        return proceed()

    def fresh(self) -> _Copied:
        return self


def _shared(value: Any, before: Any) -> Any:
    """A nest whose tensors are those of an equal nest before it where they hold the same."""
    if isinstance(value, Tensor):
        same = isinstance(before, Tensor) and value.dtype == before.dtype and torch.equal(value, before)
        return before if same else value
    if isinstance(value, dict):
        return {key: _shared(item, before[key] if before else None) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shared(item, before[i] if before else None) for i, item in enumerate(value))
    return value
