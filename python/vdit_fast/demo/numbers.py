"""What the calls and seconds of drawn clips add up to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vdit_fast.demo.recorder import PlannedCall
from vdit_fast.demo.sampler import Sample


def density_summary(
    calls: Iterable[PlannedCall], forecast: list[int], steps: int, branches: int, layers: int, heads: int
) -> dict[str, Any]:
    """Average densities; in a forecast step nothing is read, and a call that was not planned is a dense one."""
    table = torch.ones(steps, branches, layers, heads)
    table[forecast] = 0
    for call in calls:
        table[call.step, call.branch, call.layer] = torch.tensor(call.density)
    sparse_calls = ((table < 1) & (table > 0)).any(-1)
    sparse_steps = sparse_calls.flatten(1).any(1)
    return {
        "overall": table.mean().item(),
        "sparse_steps": table[sparse_steps].mean().item() if sparse_steps.any() else 1.0,
        "sparse_calls": table[sparse_calls].mean().item() if sparse_calls.any() else 1.0,
        "layer_head": (table[sparse_steps] if sparse_steps.any() else table).mean((0, 1)).tolist(),
        "layer_step": table.mean((1, 3)).T.tolist(),
    }


def step_rows(
    runs: Sequence[list[PlannedCall]], forecast: list[int], fast: list[Sample], dense: list[Sample]
) -> list[dict[str, Any]]:
    """One row per step for ``report.step_timeline``: mode, noise level, seconds of both sides and of planning.

    Args:
        runs: the planned calls of each clip in ``fast``: with medians over the same runs, planning is never longer than
            its step, however much slower one run was. Empty: nothing was planned.
    """
    rows = []
    for i, sigma in enumerate(fast[0].sigmas):
        planned = [[call for call in calls if call.step == i] for calls in runs]
        rows.append(
            {
                "mode": "forecast" if i in forecast else _mode(planned[-1] if planned else []),
                "sigma": sigma,
                "seconds": statistics.median(s.step_seconds[i] for s in fast),
                "plan_seconds": statistics.median(sum(call.seconds for call in calls) for calls in planned or [[]]),
                "dense_seconds": statistics.median(s.step_seconds[i] for s in dense),
            }
        )
    return rows


def _mode(planned: list[PlannedCall]) -> str:
    """How a computed step ran, from the calls that a planner worked on."""
    if any(call.search for call in planned):
        return "search"
    return "sparse" if planned else "dense"


def spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and all of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}
