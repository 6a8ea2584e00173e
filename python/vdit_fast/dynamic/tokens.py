"""A branch that only some tokens take: which ones, their rows, and where the results go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import combine_rows, counting_sort, gather_rows, permute_tokens
from .grouped import grouped_linear, has_grouped_gemm, say_once
from .units import Units

__all__ = ["TokenSubset", "subset_linear"]


@dataclass(frozen=True)
class TokenSubset:
    """Some of the tokens of a batch, in order, as the rows of one sequence.

    On a GPU the host does not know how many there are: room is made for all of them, and ``count`` says how many rows
    mean something.
    """

    rows: Tensor
    """int32 ``[1, K]``: the place of every row among the B * N tokens."""
    slots: Tensor
    """int32 ``[B * N, 1]``: the row of every token, -1 for those that are not selected."""
    count: Tensor | None
    """int32 ``[1]``: rows in use, the first ones; None when all K are."""
    tokens: int
    """N."""

    @classmethod
    def of(cls, selected: Tensor) -> TokenSubset | None:
        """From bool ``[B, N]``, without host synchronisation; None where the host knows that it is all: on a CPU."""
        subset = cls.on_device(selected)
        if selected.device.type != "cpu" or subset.count is None:
            return subset
        known = int(subset.count)
        if known == selected.numel():
            return None
        return cls(subset.rows[:, :known], subset.slots, None, subset.tokens)

    @classmethod
    def on_device(cls, selected: Tensor) -> TokenSubset:
        """From bool ``[B, N]``, with room for all of them and a count that the host never learns. Rows keep the order
        of the tokens."""
        order, counts = counting_sort((~selected).to(torch.int32).reshape(1, 1, -1), 2)
        place = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
        slots = permute_tokens(place.view(1, -1, 1, 1), order, inverse=True).view(-1, 1)
        count = counts[0, 0, :1]
        return cls(order[0], torch.where(slots < count, slots, -1), count, selected.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        """The selected rows ``[1, K, C]`` of x ``[B, N, C]``; rows that are not in use are 0."""
        return gather_rows(x.reshape(1, -1, x.shape[-1]), self.rows, self.count)

    def scatter(self, y: Tensor) -> Tensor:
        """``[B, N, C]``: the rows of y ``[1, K, C]`` at their tokens, 0 at the others."""
        return combine_rows(y[0], self.slots).view(-1, self.tokens, y.shape[-1])

    def add(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """``x + gate * y`` at the selected tokens, x at the others, bit for bit: x ``[B, N, C]``, y ``[1, K, C]``, gate
        ``[B, C]``; one pass."""
        flat = x.reshape(-1, x.shape[-1])
        return combine_rows(y[0], self.slots, residual=flat, gate=gate).view(x.shape)

    def zeroed(self, hidden: Tensor, units: Units) -> Tensor:
        """hidden ``[1, K, count * channels]`` with the units that are off for a row's batch item as 0."""
        if units.items is None:
            return hidden
        repeats = self.slots.shape[0] // self.tokens // len(units.items)  # a model may fold other sizes into the batch
        item = self.rows[0].div(self.tokens * repeats, rounding_mode="floor")
        kept = units.items.index_select(0, item)[None, :, :, None]
        return torch.where(kept, hidden.unflatten(-1, (units.count, -1)), 0).flatten(-2)


def subset_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: TokenSubset | None) -> Tensor:
    """``linear(x)`` for the rows in use.

    On a GPU that is one grouped product whose size is read on the device (``has_grouped_gemm``); where that is not to
    be had, all rows are computed, which is logged once.
    """
    if tokens is None or tokens.count is None:
        return functional.linear(x, weight, bias)
    if not has_grouped_gemm(x[0], weight[None]):
        say_once(f"rows of tokens that are not selected are computed too: {x.dtype} on {x.device.type}")
        return functional.linear(x, weight, bias)
    out = grouped_linear(x[0], weight[None], tokens.count)[None]
    return out if bias is None else out + bias
