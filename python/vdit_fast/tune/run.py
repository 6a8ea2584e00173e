"""``tune``: the offline search of Sparse-vDiT on a model of one's own."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from vdit_fast import report
from vdit_fast.planners import SparseVDiT
from vdit_fast.planners._mode_table import LETTER, WORD
from vdit_fast.tune.search import Columns, Search

if TYPE_CHECKING:
    from vdit_fast.tune.search import Watcher

SPARSE = tuple(mode for mode in LETTER if mode != "full")
PRICE, MAX_LOSS = 0.1, 0.05
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        planner: for ``Config(attention=planner)``.
        modes: the sparse modes that were tried, in the order of ``errors``.
        errors: step range (its first step) -> layer -> heads -> modes, relative mean square errors.
        costs, densities: of each mode, dense = 1.
        seconds: of the search.
    """

    planner: SparseVDiT
    modes: tuple[str, ...]
    errors: dict[int, dict[int, list[list[float]]]]
    costs: dict[str, float]
    densities: dict[str, float]
    seconds: float

    def shares(self) -> dict[str, float]:
        """Share of each mode among all (step, layer, head)."""
        made = self.planner.made_for
        firsts = [first for first, _ in self.planner.modes] + [made.steps]
        count: Counter[str] = Counter()
        for i, (first, rows) in enumerate(self.planner.modes):
            letters = "".join(rows) * (made.layers if len(rows) == 1 else 1)
            for letter in letters:
                count[WORD[letter]] += firsts[i + 1] - first
        return {mode: count[mode] / count.total() for mode in LETTER}

    @property
    def density(self) -> float:
        """Mean attention density of the table."""
        return self._mean(self.densities)

    @property
    def cost(self) -> float:
        """Mean cost of the table's attention, dense = 1."""
        return self._mean(self.costs)

    def _mean(self, values: dict[str, float]) -> float:
        return sum(share * {"full": 1.0, **values}.get(mode, 0.0) for mode, share in self.shares().items())


def tune(
    target: Any,
    runs: Sequence[Callable[[], Any]],
    *,
    base: SparseVDiT | None = None,
    modes: Sequence[str] = SPARSE,
    price: float = PRICE,
    max_loss: float = MAX_LOSS,
    cost: str = "time",
    groups: int | None = None,
    rounds: int = 3,
    progress: Progress | None = None,
) -> Tuned:
    """Search a mode for every (step range, layer, head) of a model (Sparse-vDiT, arXiv 2506.03065).

    Every attention call computes the exact output and that of every mode, and goes on with the best mode known so far,
    so that later layers and steps are judged on what they will see. A head's loss in a mode is

        L = error + price · cost,   error = mean square error / mean square of the exact output

    averaged over the calls of its step range (steps, guidance branches, runs). The mode of least L is taken; where
    every L exceeds ``max_loss``, or no mode is cheaper than dense attention, the head stays full.

    Args:
        target: what ``accelerate`` takes; a pipeline, since the number of steps must be known.
        runs: each draws one calibration clip with the target. All must have the same size and number of steps.
        base: a planner with the knobs to keep (sparsity, block, sinks, dense_steps, dense_layers, min_tokens).
        modes: sparse modes to try.
        price: λ of the paper; at least 0.
        max_loss: ε of the paper. Its 0.5 and 1 are for errors of an unstated scale and mean nothing here.
        cost: "time": seconds of the mode on this machine, dense = 1; "pairs": its density, the paper's 1 − S.
        groups: step ranges; None: every step has its own.
        rounds: timed rounds of the costs.
        progress: called with (steps done, steps, what).

    Raises:
        ValueError: a number out of range, no call that could be searched, or runs that differ.
        RuntimeError: as ``accelerate``.
    """
    base = SparseVDiT() if base is None else base
    _check(runs, modes, price, max_loss, cost, groups, rounds)
    started = time.perf_counter()
    stripes: dict[str, list[int]] = {}
    passes = 1 + ("vertical" in modes)
    if "vertical" in modes:
        columns = Columns(base=base, tick=_ticker(progress, 0, passes * len(runs), "column sums"))
        _watch(target, runs, columns)
        stripes = columns.stripes()
    done = (passes - 1) * len(runs)
    search = Search(
        base=replace(base, stripes=stripes, modes="full"),
        tick=_ticker(progress, done, passes * len(runs), "search"),
        modes=tuple(modes),
        price=float(price),
        max_loss=min(max(float(max_loss), -1.0), sys.float_info.max),  # settings are finite
        timed=cost == "time",
        groups=groups,
        rounds=rounds,
    )
    _watch(target, runs, search)
    record = {
        "machine": _machine(search.seen["device"]),
        "torch": torch.__version__,
        "dtype": str(search.seen["dtype"]).removeprefix("torch."),
        "cost": {"of": cost, **{mode: round(value, 4) for mode, value in search.costs.items()}},
        "price": price,
        "max_loss": max_loss if math.isfinite(max_loss) else None,
        "runs": len(runs),
    }
    made = search.seen["made_for"]
    errors: dict[int, dict[int, list[list[float]]]] = {}
    for step in range(made.steps):
        group = search.group(step, made.steps)
        if step and group == search.group(step - 1, made.steps):
            continue
        places = {layer: (group, layer) for layer in range(made.layers) if (group, layer) in search.errors}
        errors[step] = {layer: (search.errors[at] / search.calls[at]).tolist() for layer, at in places.items()}
    seconds = time.perf_counter() - started
    return Tuned(search.found(stripes, record), search.modes, errors, search.costs, search.densities, seconds)


def _check(
    runs: Sequence[Any], modes: Sequence[str], price: float, max_loss: float, cost: str, groups: int | None, rounds: int
) -> None:
    if not runs:
        raise ValueError("runs is empty; give at least one callable that draws a clip")
    wrong = [mode for mode in modes if mode not in SPARSE]
    if wrong or not modes or len(set(modes)) != len(modes):
        raise ValueError(f"modes must be different ones of {', '.join(SPARSE)}, got {list(modes)!r}")
    if not (math.isfinite(price) and price >= 0):
        raise ValueError(f"price must be a finite number of at least 0, got {price!r}")
    if math.isnan(max_loss):
        raise ValueError("max_loss is NaN; give a number, below 0 to keep every head full")
    if cost not in ("time", "pairs"):
        raise ValueError(f'cost must be "time" or "pairs", got {cost!r}')
    for name, value in (("groups", groups), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def _watch(target: Any, runs: Sequence[Callable[[], Any]], watcher: Watcher) -> None:
    from vdit_fast.accelerate import accelerate
    from vdit_fast.config import Config

    with accelerate(target, Config(attention=watcher, on_unsupported="error")) as handle:
        for run in runs:
            handle.reset()
            run()
    made = watcher.seen.get("made_for")
    if made is None:
        raise ValueError("the runs made no attention call that accelerate serves; draw with the target itself")
    if sum(watcher.dense.values()) and not _searched(watcher):
        why = "; ".join(f"{count} x {reason}" for reason, count in watcher.dense.most_common(3))
        raise ValueError(f"no attention call is left to search: {why}; lower that setting")


def _searched(watcher: Watcher) -> bool:
    return bool(watcher.sums if isinstance(watcher, Columns) else watcher.errors if isinstance(watcher, Search) else 0)


def _ticker(progress: Progress | None, first: int, total: int, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    run, last = first - 1, math.inf

    def tick(step: int, steps: int) -> None:
        nonlocal run, last
        run, last = run + (step <= last), step
        progress(run * steps + step, total * steps, what)

    return tick


def _machine(device: torch.device) -> str:
    found = report.environment()
    if device.type == "cuda":
        return str(found["gpu"]["name"])
    cpu = found["cpu"]
    return f"{cpu['model']}, {cpu['isa']}, {cpu['torch_threads']} threads"
