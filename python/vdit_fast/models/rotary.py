"""The rotary tables of a forward, exchanged by a user's function: eager, compiled and under gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdit_fast.context import StepContext
from vdit_fast.models.session import Geometry, session_by_id

__all__ = ["PositionFn", "served_tables"]

Tables = tuple[Tensor, Tensor]

PositionFn = Callable[[StepContext, Geometry, Tables], Tables | None]
"""What ``Handle.positions`` takes."""


def _exchange(cos: Tensor, sin: Tensor, handle: Tensor) -> Tables:
    session, layer = handle.tolist()
    return session_by_id(session).exchange_tables(layer, (cos, sin))


@torch.library.custom_op("vdit_fast::served_tables", mutates_args=())
def _served_op(cos: Tensor, sin: Tensor, tokens: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    new_cos, new_sin = _exchange(cos, sin, handle)
    return new_cos.clone(), new_sin.clone()  # a compiled graph may write over what an operator returns


@_served_op.register_fake
def _(cos: Tensor, sin: Tensor, tokens: Tensor, handle: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cos), torch.empty_like(sin)


def served_tables(stock: Tables, tokens: Tensor, handle: Tensor) -> Tables:
    """The tables a served layer must use instead of the model's.

    Args:
        stock: cos and sin as the transformer made them.
        tokens: the layer's input. When the whole transformer is compiled it is what orders this call after the note
            that a forward begins.
        handle: int64 CPU tensor (session id, layer index).
    """
    if torch.compiler.is_compiling():
        new: Any = torch.ops.vdit_fast.served_tables(*stock, tokens, handle)
        return new[0], new[1]
    return _exchange(*stock, handle)
