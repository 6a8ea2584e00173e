"""The rotary tables of a forward, exchanged by a user's function: eager, compiled and under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdit_fast.context import StepContext
from vdit_fast.models.session import Geometry, session_by_id

if TYPE_CHECKING:
    from vdit_fast.models.row_shard import RowShard

__all__ = ["PositionFn", "served_tables"]

Tables = tuple[Tensor, Tensor]

PositionFn = Callable[[StepContext, Geometry, Tables], Tables | None]
"""What ``Handle.positions`` takes."""


def _exchange(stock: Tables, handle: Tensor, anchor: Tensor) -> Tables:
    """The rotary tables of this forward: what the user's function makes of the model's, once per forward."""
    number, layer = handle.tolist()
    session = session_by_id(number)
    positions = session.positions
    if positions is None:
        return stock
    forward = session.forward_of(anchor)
    if forward is None or forward.geometry is None:
        problem = "called outside a forward of its transformer" if forward is None else "the video grid is unknown"
        raise RuntimeError(
            f"positions: {session.layers[layer].name} has no step and grid to give the function ({problem}); "
            "run the whole transformer, or switch it off with handle.positions(None)"
        )
    kind = (stock[0].shape, stock[0].dtype, stock[0].device)
    if kind not in forward.tables:
        whole = stock if forward.shard is None else _whole(stock, forward.shard)
        found = _checked(positions(forward.step, forward.geometry, whole), whole)
        forward.tables[kind] = found if forward.shard is None else _own(found, stock, forward.shard)
        if forward.tables[kind] is not None:
            session.repositioned[forward.step.step] += 1
    new = forward.tables[kind]
    return stock if new is None else new


def _whole(stock: Tables, shard: RowShard) -> Tables:
    """The model's tables of all rows, of which a rank of sequence parallelism has its own."""
    found = [shard.source(table) for table in stock]
    if None in found:
        raise RuntimeError(
            "positions: over several ranks the tables must be cut where the blocks begin, which these are not; switch "
            "positions off with handle.positions(None), or end the sequence parallelism"
        )
    return found[0][0], found[1][0]  # type: ignore[index]


def _own(new: Tables | None, stock: Tables, shard: RowShard) -> Tables | None:
    """The own rows of tables for all of them."""
    if new is None:
        return None
    dims = [shard.source(table)[1] for table in stock]  # type: ignore[index]
    return shard.own(new[0], dims[0]).contiguous(), shard.own(new[1], dims[1]).contiguous()


def _checked(new: Any, stock: Tables) -> Tables | None:
    """What a positions function returned, in the form of the model's own tables."""
    if new is None:
        return None
    if not isinstance(new, tuple | list) or len(new) != 2 or not all(isinstance(x, Tensor) for x in new):
        got = f"{len(new)} values" if isinstance(new, tuple | list) and len(new) != 2 else type(new).__name__
        raise TypeError(f"positions: the function must return two tensors (cos, sin) or None, got {got}")
    out = []
    for label, table, own in zip(("cos", "sin"), new, stock, strict=True):
        if [n for n in table.shape if n != 1] != [n for n in own.shape if n != 1] or not table.is_floating_point():
            raise ValueError(
                f"positions: {label} is {table.dtype} {list(table.shape)}, but the model's is {own.dtype} "
                f"{list(own.shape)}; return floating-point tables of that shape, up to dimensions of size 1"
            )
        out.append(table.to(own.device, own.dtype).reshape(own.shape))
    return out[0], out[1]


@torch.library.custom_op("vdit_fast::served_tables", mutates_args=())
def _served_op(cos: Tensor, sin: Tensor, tokens: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    new_cos, new_sin = _exchange((cos, sin), handle, cos)
    return new_cos.clone(), new_sin.clone()  # a compiled graph may write over what an operator returns


@_served_op.register_fake
def _(cos: Tensor, sin: Tensor, tokens: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cos), torch.empty_like(sin)


def served_tables(stock: Tables, tokens: Tensor, handle: Tensor, anchor: Tensor) -> Tables:
    """The tables a served layer must use instead of the model's.

    Args:
        stock: cos and sin as the transformer made them.
        tokens: the layer's input. When the whole transformer is compiled it is what orders this call after the note
            that a forward begins.
        handle: int64 CPU tensor (session id, layer index).
        anchor: as in ``served_attention``.
    """
    if torch.compiler.is_compiling():
        new: Any = torch.ops.vdit_fast.served_tables(*stock, tokens, handle)
        return new[0], new[1]
    return _exchange(stock, handle, anchor)
