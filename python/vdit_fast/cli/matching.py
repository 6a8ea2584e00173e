"""The knob of each sparse method, and the search for the value that gives a wanted density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vdit_fast.planners import REGISTRY, Planner

TOLERANCE = 0.05
"""Densities at most so far apart count as matched."""
CLOSE = 0.01
"""The search ends at this distance."""


@dataclass(frozen=True)
class Method:
    """How a planner takes part in the comparison.

    Attributes:
        knob: the setting that changes its density.
        low, high: between which values it is searched; density may rise or fall with it.
        choices: the values to try instead, for a knob that is no number.
        fixed: settings that fit frames of 16 x 16 tokens, where the planner's defaults are made for larger ones.
        searches: whether its first call after `dense_steps` is a dense one, in which it learns what the sparse ones
            need; that is then the last of the dense steps that all methods share.
        prepare: an offline search, (pipeline, one run of it, the planner) -> more fixed settings.
    """

    knob: str
    low: float = 0.02
    high: float = 0.98
    choices: tuple[Any, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    searches: bool = False
    prepare: Callable[[Any, Callable[[], Any], Planner], Mapping[str, Any]] | None = None


def _modes_per_head(pipe: Any, run: Callable[[], Any], planner: Planner) -> Mapping[str, Any]:
    """Sparse-vDiT's table of the least error among its modes of the planner's density; no head is full or skipped."""
    from vdit_fast.planners import SparseVDiT
    from vdit_fast.tune import tune

    assert isinstance(planner, SparseVDiT)
    sparse = ("diagonal", "multi_diagonal", "vertical")
    tuned = tune(pipe, [run], base=planner, modes=sparse, price=0.0, max_loss=math.inf, cost="pairs")
    found = tuned.planner.to_dict()
    return {knob: found[knob] for knob in ("modes", "stripes", "made_for", "record")}


METHODS: dict[str, Method] = {
    "adaspa": Method("sparsity", low=0.34, fixed={"search": [0.0, 0.6]}, searches=True),
    "draft": Method("sparsity", fixed={"pool": [4, 8]}),
    "draft+compensate": Method("sparsity", fixed={"pool": [4, 8], "compensate": True}),
    "radial": Method("decay", low=0.0, high=4.0, fixed={"block": 16}),  # larger ones cannot go below 0.4
    "rettention": Method("window", searches=True),
    "sliding_tile": Method("sparsity", fixed={"tile": [4, 4, 4]}),
    "sparge": Method("sparsity"),
    "sparse_vdit": Method("sparsity", fixed={"block": 64}, prepare=_modes_per_head),
    "svg1": Method("sparsity", fixed={"block": 64}),
    "svg2": Method("top_p", high=1.0),
    "svg2+compensate": Method("top_p", high=1.0, fixed={"compensate": True}),
    "vsa": Method("sparsity"),
    "window": Method("sparsity", fixed={"tile": [2, 4, 4]}),
    "xattention": Method("top_p", high=1.0, fixed={"block": 64}),
}
"""One line per planner, or per variant ``planner+what``; a planner without a line joins by its `sparsity` or `top_p`,
and is else reported as left out."""


def planner_name(name: str) -> str:
    """The planner of a method: what stands before the "+" of a variant."""
    return name.partition("+")[0]


def method(name: str) -> Method | None:
    """The table's line for a method, or one made of the planner's own knobs; None where neither exists."""
    if name in METHODS:
        return METHODS[name]
    known = {f.name for f in fields(REGISTRY[planner_name(name)])}
    return next((Method(knob) for knob in ("sparsity", "top_p") if knob in known), None)


@dataclass(frozen=True)
class Match:
    """A knob's value and the density it gave; None: every call stayed dense."""

    value: Any
    density: float | None


def match(found: Method, density: Callable[[Any], float | None], target: float, probes: int) -> Match:
    """The value whose density comes nearest to ``target``, by at most ``probes`` tries.

    Numbers are halved between the ends, in the order that the ends themselves show; of `choices` all are tried.
    """
    tried: list[Match] = []

    def attempt(value: Any) -> float:
        got = density(value)
        tried.append(Match(value, got))
        return math.nan if got is None else got

    if found.choices:
        for value in found.choices:
            attempt(value)
    else:
        low, high = found.low, found.high
        at_low, at_high = attempt(low), attempt(high)
        rising = not at_high < at_low  # also where an end is not sparse at all
        for _ in range(probes - 2):
            if min(_distance(m, target) for m in tried) <= CLOSE:
                break
            middle = (low + high) / 2
            got = attempt(middle)
            if (got < target) == rising:
                low = middle
            else:
                high = middle
    return min(tried, key=lambda m: _distance(m, target))


def _distance(found: Match, target: float) -> float:
    return math.inf if found.density is None else abs(found.density - target)
