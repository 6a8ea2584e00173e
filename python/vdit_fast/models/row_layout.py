"""Where a family has one row per video token besides the stream that its blocks change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

__all__ = ["RowLayout", "Take", "along"]

Take = Callable[[Tensor, int], Tensor]
"""``take(tensor, dim)``: the tensor with the chosen rows only of the dimension that has one entry per video token."""


@dataclass(frozen=True)
class RowLayout:
    """What subset execution must know of a family."""

    channels: Literal["first", "last"]
    """Place of the channels within a row of the output: before or after the places of the patch."""
    output: str = "proj_out"
    """Path of the module behind the blocks that returns [B, video tokens, patch · channels]; what comes after it only
    moves values."""
    arguments: Mapping[str, Callable[[Any, Take], Any]] = field(default_factory=dict)
    """Argument of a block -> what it is for some tokens."""
    joint: Mapping[str, Callable[[Any, Take], Any]] = field(default_factory=dict)
    """The same for those with one entry per token of video and text."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Argument of a block -> why no subset can run where it is given."""
    leading: Mapping[str, str] = field(default_factory=dict)
    """Refused argument of a block that concerns the first rows only -> the argument that says how many these are: a run
    of rows has some of them."""
    between: Mapping[str, str] = field(default_factory=dict)
    """Attribute of the transformer that works on the rows between blocks -> why it needs all of them."""


def along(dims: Mapping[int, int]) -> Callable[[Any, Take], Any]:
    """For tensors, or tuples of them: number of dimensions -> the one that has an entry per token, or one for all.

    Tensors of other numbers of dimensions are the same for all tokens.
    """

    def of(value: Any, take: Take) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(of(part, take) for part in value)
        if not isinstance(value, Tensor) or value.ndim not in dims or value.shape[dims[value.ndim]] == 1:
            return value
        return take(value, dims[value.ndim])

    return of
