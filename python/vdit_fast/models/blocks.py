"""Standing around the calls of a transformer's blocks: what feature caches, row subsets and hooks have in common.

An adapter names the lists of blocks in the order they run. While anything stands around them, every block *object* has
a ``forward`` that hands its call from the outermost to the innermost and then to what was there before (the fused
forward, another library's wrapper, or the class's own).
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from vdit_fast.forwards import ForwardStandIn

if TYPE_CHECKING:
    from vdit_fast.models.base import ModelAdapter
    from vdit_fast.models.session import Session

__all__ = [
    "LAYERS",
    "Around",
    "Block",
    "BlockCall",
    "attach",
    "detach",
    "streams",
    "transformer_blocks",
    "with_streams",
]

LAYERS = ("stage", "references", "sequence", "hooks", "cache", "memory", "subset")
"""Who may stand around a block, outermost first: a pipeline stage leaves out what other ranks compute, references
lengthen everybody's text, sequence parallelism leaves a rank's rows, hooks see what a cache forecasts, a cache sees all
rows, memory sees the modulation of all rows and is not asked where a cache leaves the block out."""


@dataclass(frozen=True)
class Block:
    """One block of a transformer."""

    index: int
    """Place in the order in which blocks run."""
    count: int
    """Number of blocks."""
    name: str
    """Module path inside the transformer."""
    streams: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    """The arguments that blocks of this family change, in the order of what they return; a block that returns one
    tensor changes the first only."""


@dataclass
class BlockCall:
    """One call of one block."""

    block: Block
    module: nn.Module
    session: Session
    """Of the transformer that the block belongs to."""
    arguments: dict[str, Any]
    """By name; whoever stands around may exchange them before going on."""
    rest: tuple[Any, ...] = ()
    """Positional arguments beyond the named ones."""

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The streams as they come in, in the order of ``block.streams``; None where the block has no such argument."""
        return tuple(self.arguments.get(name) for name in self.block.streams)


class Around(Protocol):
    """Stands around the calls of all blocks of one transformer."""

    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        """The block's output: ``proceed()`` for what lies further inside, with ``call.arguments`` as they are then."""
        ...

    def fresh(self) -> Around:
        """The same settings without records, for a copied model."""
        ...


def transformer_blocks(root: nn.Module, adapter: ModelAdapter) -> list[tuple[str, nn.Module]]:
    """(path, block) of a transformer's blocks in the order in which they run; empty where the family names none."""
    found = []
    for path in adapter.block_lists:
        blocks = getattr(root, path, None)
        if isinstance(blocks, nn.ModuleList):
            found += [(f"{path}.{index}", block) for index, block in enumerate(blocks)]
    return found


def streams(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a block returns, in the order of ``Block.streams``."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def with_streams(output: Any, new: Sequence[Tensor]) -> Any:
    """Other tensors in the form of a block's output."""
    return new[0] if isinstance(output, Tensor) else tuple(new)


class AroundForward(ForwardStandIn):
    """Stands in for ``forward`` of one block."""

    def __init__(
        self, module: nn.Module, block: Block, session: Session, root: nn.Module, around: str = "around"
    ) -> None:
        super().__init__(module, session)
        self._around = around  # the session's attribute that says who stands here
        self._root = weakref.ref(root)
        self._block = block
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [name for name, item in self.__signature__.parameters.items() if item.kind in kinds]

    # A compiled block is cut here: decisions are taken anew in every call. What lies inside is compiled on its own.
    @torch.compiler.disable(
        recursive=False,
        reason="hooks, caches and subsets at blocks decide anew in every call; compile without fullgraph",
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session, inner = self._session, self.inner
        present: dict[str, Around] = getattr(session, self._around) if session.active else {}
        around = [present[layer] for layer in LAYERS if layer in present]
        place = self._around, self._block.name
        if not around or place in session.standing:  # another library's wrapper may hold an older one of ours
            return inner(*args, **kwargs)
        module = self._module()
        assert module is not None
        named = dict(zip(self._names, args, strict=False)) | kwargs
        call = BlockCall(self._block, module, session, named, args[len(self._names) :])

        def enter(depth: int) -> Any:
            if depth < len(around):
                return around[depth](call, lambda: enter(depth + 1))
            if not call.rest:
                return inner(**call.arguments)
            first = [call.arguments[name] for name in self._names]
            extra = {name: value for name, value in call.arguments.items() if name not in self._names}
            return inner(*first, *call.rest, **extra)

        session.standing.add(place)
        try:
            return enter(0)
        finally:
            session.standing.discard(place)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self._module()
        copied = memo.get(id(module))
        if copied is None:
            return None
        root = self._root()
        if root is None or id(root) not in memo:  # a part is copied, which gets what lay inside
            return copy.deepcopy(self.inner, memo)
        new = object.__new__(AroundForward)
        memo[id(self)] = new
        new._module, new._root = weakref.ref(copied), weakref.ref(memo[id(root)])
        new._session, new._around = copy.deepcopy(self._session, memo), self._around
        new._block, new._names, new.__signature__ = self._block, self._names, self.__signature__
        new._inner = copy.deepcopy(self._inner, memo)
        return new


def attach(root: nn.Module, session: Session, adapter: ModelAdapter) -> int:
    """Let ``session.around`` stand around every block; returns the number of blocks."""
    blocks = transformer_blocks(root, adapter)
    for index, (name, module) in enumerate(blocks):
        present = module.__dict__.get("forward")
        if isinstance(present, AroundForward) and present.of(session):
            continue
        block = Block(index, len(blocks), name, adapter.block_streams)
        AroundForward(module, block, session, root).attach()
    return len(blocks)


def detach(root: nn.Module, session: Session, adapter: ModelAdapter) -> None:
    """Give every block its former ``forward`` back."""
    for _, module in transformer_blocks(root, adapter):
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, AroundForward) and wrapper.of(session):
            wrapper.detach()
