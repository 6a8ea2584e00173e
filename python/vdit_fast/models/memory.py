"""Memory rows: tokens beside the video that every block turns into keys and values, and whose outputs nobody computes.

DiT-Mem puts the same rows behind the video in every block, before norm and modulation, without RoPE, and drops what
attention makes of them (arXiv 2511.19229). Without queries only their keys and values are left: norm,
modulation and two projections of M rows per block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdit_fast.context import StepContext
from vdit_fast.models.block_modules import BlockModules
from vdit_fast.models.extra_keys import extra_keys
from vdit_fast.models.qk import normed
from vdit_fast.models.trace import Unknown, identity_of, trace_of

if TYPE_CHECKING:
    from vdit_fast.models.base import ModelAdapter
    from vdit_fast.models.blocks import BlockCall
    from vdit_fast.models.forward import Forward

__all__ = ["Memory", "MemoryFn", "MemoryLayout", "MemoryRows", "checked_rows", "memory_layers"]

MemoryFn = Callable[[StepContext], Tensor | None]
"""Memory rows of a step; None for none."""
MemoryRows = Tensor | MemoryFn


_BESIDE = ("norm", "patch", "proj", "rope")
"""Beginnings of the names of a transformer's own modules, of its blocks apart, that no ``temb`` comes from."""
_NOT_TEMB = ("hidden_states", "latents", "mask", "rotary")
"""Parts of the names of a transformer's arguments that do not enter ``temb`` where branches share it."""


@dataclass(frozen=True)
class MemoryLayout:
    """How blocks of a class make keys and values of rows that are not in the sequence."""

    attention: str
    """The block's self-attention."""
    across: bool = False
    """Whether the norm of keys runs over all heads' channels."""
    tokens_dim: Mapping[int, int] = field(default_factory=dict)
    """Dimensions of ``temb`` -> the one of tokens, where tokens have a modulation of their own."""
    timestep_only: bool = True
    """Whether nothing but the timestep enters ``temb``, so that guidance branches share keys and values."""
    exchanged: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the block that concern the video's own tokens -> what memory gets instead."""

    def arguments(self, given: Mapping[str, Any], stream: str, rows: Tensor, forward: Forward | None) -> dict[str, Any]:
        """A block's arguments with memory rows [B, M, C] in place of the video's."""
        new = {**given, **{name: value for name, value in self.exchanged.items() if name in given}, stream: rows}
        temb = given["temb"]
        dim = self.tokens_dim.get(temb.ndim)
        if dim is not None and temb.shape[dim] > 1:
            new["temb"] = _noisiest(temb, dim, forward)
        batch = rows.shape[0]
        if new["temb"].shape[0] != batch:
            new["temb"] = new["temb"][:batch]
        if isinstance(text := new.get("encoder_hidden_states"), Tensor):
            new["encoder_hidden_states"] = text[:batch, :1]  # normed beside the video in some families
        return new

    def keys(
        self, modules: BlockModules, block: Any, arguments: Mapping[str, Any], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """k and v [B, M, Hkv, D] of a block whose ``arguments`` hold the rows."""
        x = modules.modulated(block, arguments).type_as(rows)
        attn = getattr(block, self.attention)
        if getattr(attn, "fused_projections", False):
            _, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            key, value = attn.to_k(x), attn.to_v(x)
        key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (key, value))
        return normed(key, attn.norm_k, self.across), value


def _noisiest(temb: Tensor, dim: int, forward: Forward | None) -> Tensor:
    """Of a modulation per token, that of the token with the most noise: a step has one timestep, and tokens that differ
    from it are conditions, which are cleaner. One token stays along ``dim``."""
    timestep = forward.timestep if forward is not None else None
    geometry, tokens = forward.geometry if forward is not None else None, temb.shape[dim]
    known = isinstance(timestep, Tensor) and timestep.ndim == 2 and tokens % timestep.shape[1] == 0
    if not known or geometry is None or geometry.n_video != tokens:
        raise RuntimeError(
            f"memory: tokens have a modulation of their own {list(temb.shape)}, and no timesteps [batch, tokens] tell "
            "which of them memory gets; call the whole transformer with such timesteps, or switch "
            "memory off by handle.memory(None)"
        )
    assert isinstance(timestep, Tensor)
    token = timestep.argmax(dim=1).to(temb.device) * (temb.shape[dim] // timestep.shape[1])
    shape = [1] * temb.ndim
    shape[0] = -1
    index = token.view(shape).expand(*(1 if at == dim else size for at, size in enumerate(temb.shape)))
    return temb.gather(dim, index)


class Memory:
    """Stands around the blocks of one transformer, inside of the caches: a block that is left out needs no keys.

    Args:
        source: rows [1 or B, M, C], or what makes them, once per forward.
        layers: block path -> number of its attention among the served layers, and its recipe.
    """

    def __init__(self, source: MemoryRows, layers: dict[str, tuple[int, BlockModules]]) -> None:
        self.source, self.layers = source, layers
        self.computed = 0
        """Layers' keys and values that were computed, and below those of another guidance branch that served again."""
        self.shared = 0
        self._kept: dict[int, tuple[Any, Tensor, tuple[Tensor, Tensor]]] = {}
        self._placed: tuple[Any, Tensor] | None = None

    def fresh(self) -> Memory:
        return Memory(self.source, self.layers)

    @property
    def tokens(self) -> int | None:
        """Number of memory rows; None where a function makes them."""
        return self.source.shape[1] if isinstance(self.source, Tensor) else None

    @staticmethod
    def note(forward: Forward, root: nn.Module, lists: Sequence[str], arguments: Mapping[str, Any]) -> None:
        """A forward begins: note what its ``temb`` is made of, beside the timestep. Nobody notes it where the
        transformer is compiled as a whole, and branches share nothing then.

        Args:
            lists: names of the children that hold blocks.
            arguments: of the transformer, by name.
        """
        parts = [part for name, part in root.named_children() if name not in lists and not name.startswith(_BESIDE)]
        given = [
            (name, value)
            for name, value in arguments.items()
            if name != "timestep" and not any(part in name for part in _NOT_TEMB)
        ]
        try:
            forward.modulation = _trace_of_values(given), trace_of(parts)
        except Unknown:
            forward.modulation = None

    def forget(self) -> None:
        """Let go of keys and values: nobody will ask for them again."""
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held for the next guidance branch."""
        return sum(x.nbytes for _, _, pair in self._kept.values() for x in pair)

    # A compiled block is cut at what stands around it; what is kept from call to call is no part of a graph.
    @torch.compiler.disable(recursive=False)
    def __call__(self, call: BlockCall, proceed: Callable[[], Any]) -> Any:
        session = call.session
        forward = session.forward_among(_tensors(call.arguments))
        rows = self._rows(forward, session.expert)
        if rows is None:
            return proceed()
        (layer, modules), present = self.layers[call.block.name], extra_keys(session)
        present.memory[layer] = self._keys(call, layer, modules, rows, forward)
        present.read.discard(layer)
        try:
            output = proceed()
        finally:
            del present.memory[layer]
        if layer not in present.read:
            raise RuntimeError(
                f"memory: attention of {call.block.name} did not read it, its stock processor ran; see the "
                "fallbacks in report(), or switch memory off by handle.memory(None)"
            )
        return output

    def _rows(self, forward: Forward | None, expert: str) -> Tensor | None:
        source = self.source
        if forward is not None and forward.memory:  # a tuple, as None is an answer
            return forward.memory[0]
        if isinstance(source, Tensor):
            rows: Tensor | None = source
        else:
            rows = checked_rows("memory", source(forward.step if forward is not None else StepContext(expert=expert)))
        if forward is not None:
            forward.memory = (rows,)
        return rows

    def _keys(
        self, call: BlockCall, layer: int, modules: BlockModules, rows: Tensor, forward: Forward | None
    ) -> tuple[Tensor, Tensor]:
        stream, layout = call.block.streams[0], modules.memory
        assert isinstance(layout, MemoryLayout)
        x = call.arguments[stream]
        if rows.shape[-1] != x.shape[-1] or rows.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"memory: rows are {list(rows.shape)}, the tokens of {call.block.name} {list(x.shape)}; pass "
                f"[M, {x.shape[-1]}] or [{x.shape[0]}, M, {x.shape[-1]}]"
            )
        one = _one_timestep(forward) and layout.timestep_only
        place = x.dtype, x.device
        key = (
            self._key(forward, call.module, layout, (*place, torch.is_autocast_enabled(x.device.type)))
            if one and not torch.is_grad_enabled()
            else None
        )
        known = self._kept.get(layer)
        if key is not None and known is not None and known[0] == key and known[1] is rows:
            self.shared += 1
            return known[2]
        self._kept.pop(layer, None)  # its memory before the new one's
        placed = self._on(rows, *place)
        if not one:
            placed = placed.expand(x.shape[0], -1, -1)
        arguments = layout.arguments(call.arguments, stream, placed, forward)
        pair = layout.keys(modules, call.module, arguments, placed)
        self.computed += 1
        if key is not None:
            self._kept[layer] = key, rows, pair
        return pair

    def _on(self, rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows as a block needs them, converted once."""
        if rows.requires_grad and torch.is_grad_enabled():
            return rows.to(device, dtype)
        known = self._placed
        if known is None or known[0] is not rows or (known[1].dtype, known[1].device) != (dtype, device):
            with torch.inference_mode(False):  # a later forward may record gradients
                known = self._placed = rows, rows.detach().to(device, dtype)
        return known[1]

    @staticmethod
    @torch.compiler.disable
    def _key(forward: Forward | None, block: nn.Module, layout: MemoryLayout, place: Any) -> Any:
        """What guidance branches of a step have in common, weights included; None where it is not known."""
        step = forward.step if forward is not None else None
        if forward is None or step is None or step.step < 0 or step.timestep is None or forward.modulation is None:
            return None
        attn = getattr(block, layout.attention)
        parts = (getattr(attn, name, None) for name in ("to_k", "to_v", "to_qkv", "norm_k"))
        own = {name: item for name, item in block._parameters.items() if item is not None}
        try:
            weights = _trace_of_values(own), trace_of((getattr(block, "norm1", None), *parts))
        except Unknown:
            return None
        return step.generation, step.step, step.timestep, step.expert, place, forward.modulation, weights


def _trace_of_values(value: Any) -> Any:
    """What stays the same while a value, or what it consists of, does; ``Unknown`` where that cannot be told."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return [(key, _trace_of_values(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_trace_of_values(item) for item in value]
    return identity_of(value)


def checked_rows(what: str, rows: Any) -> Tensor | None:
    """Rows as [1 or B, M, C]; raises TypeError or ValueError where they are none."""
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{what}: rows must be a floating tensor [M, C] or [B, M, C], got {kind}")
    if rows.ndim not in (2, 3) or 0 in rows.shape:
        raise ValueError(f"{what}: rows must be [M, C] or [B, M, C] and not empty, got {list(rows.shape)}")
    return rows if rows.ndim == 3 else rows[None]


def memory_layers(
    adapter: ModelAdapter, blocks: list[tuple[str, nn.Module]], served: list[str]
) -> dict[str, tuple[int, BlockModules]]:
    """Block path -> number of its attention among the served layers, and its recipe.

    Raises:
        RuntimeError: a recipe is not known, or a layer would go without memory.
    """
    numbers = {name: number for number, name in enumerate(served)}
    found = {}
    for name, block in blocks:
        modules = adapter.block_modules.get(type(block).__name__)
        layout = modules.memory if modules is not None else f"nobody knows the keys of a {type(block).__name__}"
        if modules is None or isinstance(layout, str):
            raise RuntimeError(f"memory: family {adapter.family!r}: {layout}")
        attention = f"{name}.{layout.attention}"
        if attention not in numbers:
            raise RuntimeError(f"memory: {attention} is not served and would go without; see skipped in stats()")
        found[name] = numbers.pop(attention), modules
    if numbers or not found:
        raise RuntimeError(
            f"memory: family {adapter.family!r}: {next(iter(numbers), 'attention')} lies outside of blocks that follow "
            "one another, and would go without"
        )
    return found


def _one_timestep(forward: Forward | None) -> bool:
    """Whether all batch items and tokens are known to have one timestep, without a look at device values."""
    timestep = forward.timestep if forward is not None else None
    if not isinstance(timestep, Tensor):
        return isinstance(timestep, int | float)
    return all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    items = (item for value in arguments.values() for item in (value if isinstance(value, tuple) else (value,)))
    return [item for item in items if isinstance(item, Tensor)]
