"""Forwards that stand in for those of a block's own modules while DyDiT is applied: on the objects, never the classes.

Each asks its ``Place`` what the block computes in this call and hands the call on when that is everything.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..forwards import stock_forward
from .tokens import TokenSubset, subset_linear
from .units import Units, WeightParts, take

__all__ = ["AttentionStandIn", "LinearStandIn", "MlpStandIn", "NormStandIn", "Place", "StandIn", "Work"]


class Work:
    """FLOP of the routed layers: what the dense model would do, and what was done."""

    def __init__(self) -> None:
        self.dense = 0.0
        self._done = 0.0
        self._on_device: Tensor | None = None
        self.recorded = 0
        """Forwards with gradients since the last backward that ran blocks again."""
        self.replayed = False

    def add(self, dense: float, done: float) -> None:
        self.dense += dense
        self._done += done

    def add_rows(self, dense: float, rows: Tensor, per_row: float) -> None:
        """As ``add``, with a number of rows int32 ``[1]`` that only the device knows."""
        self.dense += dense
        more = rows.double() * per_row
        self._on_device = more if self._on_device is None else self._on_device + more

    @property
    def done(self) -> float:
        """Waits for the device where rows were counted there."""
        return self._done + (0.0 if self._on_device is None else float(self._on_device))


@dataclass
class Place:
    """One block: its routers, and what it computes in the running call."""

    name: str
    work: Work
    heads: Units | None = None
    groups: Units | None = None
    token_router: Callable[[Tensor], Tensor] | None = None
    selected: Tensor | None = None
    """bool ``[B, N]``, from the token router, between the norm before the MLP and the MLP."""
    tokens: TokenSubset | None = None
    """While the MLP runs for some tokens."""
    active: bool = True
    parts: list[WeightParts] = field(default_factory=list)
    root: Any = None
    """Weak reference to the model: in a copy of a part of it nothing is left out."""

    def units(self, kind: str) -> Units | None:
        """``heads`` or ``groups`` where some are off."""
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs a block again
            if self.work.recorded > 1:
                raise RuntimeError(
                    "DyDiT: gradient checkpointing runs a forward again whose decisions a later one has replaced; call "
                    "backward before the next forward"
                )
            self.work.replayed = True
        units = self.heads if kind == "heads" else self.groups
        return None if units is None or units.all_on or not self.active else units

    def select(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the norm before the MLP, which sees the tokens that the router reads."""
        if self.active and self.token_router is not None:
            self.selected = self.token_router(args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        root = None if self.root is None else memo.get(id(self.root()))
        new = Place(self.name, Work(), active=self.active and root is not None)
        memo[id(self)] = new
        new.parts = copy.deepcopy(self.parts, memo)
        new.token_router = copy.deepcopy(self.token_router, memo)
        new.root = None if root is None else weakref.ref(root)
        return new

    def __reduce__(self) -> Any:
        return _idle, ()  # a pickled model is the stock one


def _idle() -> Place:
    return Place("", Work(), active=False)


class StandIn:
    """The forward of one module object."""

    def __init__(self, module: nn.Module, place: Place) -> None:
        self.module, self.place = module, place
        self._before = module.__dict__.get("forward")
        object.__setattr__(module, "forward", self)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What this object stands in for."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return stock_forward(self.module)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def detach(self) -> None:
        """Give the module its forward back; a wrapper that was put around this one later stays and passes through."""
        if self.module.__dict__.get("forward") is not self:
            return
        if self._before is None:
            del self.module.__dict__["forward"]
        else:
            object.__setattr__(self.module, "forward", self._before)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def __reduce__(self) -> Any:
        return stock_forward, (self.module,)


class LinearStandIn(StandIn):
    """A projection into units, whose rows are cut, or out of them, whose columns are."""

    def __init__(self, module: nn.Linear, place: Place, kind: str, *, into: bool, parts: int = 1) -> None:
        super().__init__(module, place)
        self.kind, self.into, self.parts = kind, into, parts
        self._weights = WeightParts()
        place.parts.append(self._weights)

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        units = self.place.units(self.kind)
        tokens = self.place.tokens if self.kind == "groups" else None
        linear: Any = self.module
        if units is None:
            if tokens is None or tokens.count is None:
                out: Tensor = self.inner(x)
                return out
            return subset_linear(x, linear.weight, linear.bias, tokens)
        on = units.on
        weight, bias = self._weights.get(on, (linear.weight, linear.bias), lambda: self._cut(on))
        assert weight is not None
        if not self.into:
            x = units.zeroed(x) if tokens is None else tokens.zeroed(x, units)
        return functional.linear(x, weight, bias) if tokens is None else subset_linear(x, weight, bias, tokens)

    def _cut(self, on: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        linear: Any = self.module
        if not self.into:
            return take(linear.weight, 1, on), linear.bias
        bias = None if linear.bias is None else take(linear.bias, 0, on, self.parts)
        return take(linear.weight, 0, on, self.parts), bias


class NormStandIn(StandIn):
    """A norm of q or k over all heads' channels: it needs them all, and only those that are on go further."""

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        units = self.place.units("heads")
        return out if units is None else take(out, -1, units.on)


class AttentionStandIn(StandIn):
    """Self-attention, told how many heads there are."""

    def __init__(self, module: nn.Module, place: Place, *, across: bool) -> None:
        super().__init__(module, place)
        self.across = across  # q and k are projected for all heads

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        units = self.place.units("heads")
        if self.place.active:
            self._count(x, 1.0 if units is None else units.count / len(units.on))
        if units is None:
            return self.inner(*args, **kwargs)
        if self.across and hasattr(module.processor, "session"):
            raise RuntimeError(
                f"{self.place.name}: its norms of q and k run over all heads, and accelerate() has replaced its "
                "processor; remove the acceleration, or leave the routers of heads (attn_rate) out"
            )
        session = getattr(module.processor, "session", None)
        if session is not None and session.active and (session.stand_ins or session.config.subset is not None):
            raise RuntimeError(
                f"{self.place.name}: DyDiT leaves heads out, and accelerate() keeps keys (subset) or has maps (linear) "
                "of every head; set subset and linear to null, or leave the routers of heads (attn_rate) out"
            )
        heads, module.heads = module.heads, units.count
        try:
            return self.inner(*args, **kwargs)
        finally:
            module.heads = heads

    def _count(self, x: Tensor, on: float) -> None:
        batch, n, channels = x.shape
        to_v: Any = self.module.get_submodule("to_v")
        inner = int(to_v.weight.shape[0])
        one = 2.0 * batch * n * channels * inner  # q, k, v or the output
        scores = 4.0 * batch * n * n * inner
        self.place.work.add(4 * one + scores, ((2 + 2 * on) if self.across else 4 * on) * one + on * scores)


class MlpStandIn(StandIn):
    """The MLP, for the tokens that the router selected."""

    def __init__(self, module: nn.Module, place: Place, weights: int, router: int) -> None:
        super().__init__(module, place)
        self.weights, self.router = weights, router  # numbers of parameters that a token meets

    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place = self.place
        if not place.active:
            passed: Tensor = self.inner(x, *args, **kwargs)
            return passed
        units = place.units("groups")
        dense = 2.0 * math.prod(x.shape[:-1]) * self.weights
        per_row = 2.0 * self.weights * (1.0 if units is None else units.count / len(units.on))
        subset = self._subset(x)
        if subset is None:
            place.work.add(dense, per_row * math.prod(x.shape[:-1]))
            out: Tensor = self.inner(x, *args, **kwargs)
            return out
        if subset.count is None:
            place.work.add(dense, per_row * subset.rows.shape[1])
        else:
            place.work.add_rows(dense, subset.count, per_row)
        if subset.rows.shape[1] == 0:
            return torch.zeros_like(x)
        place.tokens = subset
        try:
            return subset.scatter(self.inner(subset.gather(x), *args, **kwargs))
        finally:
            place.tokens = None

    def _subset(self, x: Tensor) -> TokenSubset | None:
        place, selected = self.place, self.place.selected
        place.selected = None
        if place.token_router is None:
            return None
        if selected is None or selected.shape != x.shape[:-1]:
            seen = "never ran" if selected is None else f"saw tokens {list(selected.shape)}"
            raise RuntimeError(
                f"{place.name}: the norm before the MLP {seen}, but the MLP gets {list(x.shape[:-1])}; the token "
                "router reads that norm's input, so the block must call both on the same tokens (no chunked "
                "feed-forward)"
            )
        place.work.add(0.0, 2.0 * selected.numel() * self.router)
        return TokenSubset.of(selected)
