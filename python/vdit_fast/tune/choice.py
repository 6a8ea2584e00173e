"""From errors and costs to a mode per head, and what a mode costs on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vdit_fast.ops.attention import attention
from vdit_fast.plan import AttentionPlan


def choose(errors: Tensor, costs: Sequence[float], price: float, max_loss: float) -> Tensor:
    """The mode of every head: arg min of loss = error + price · cost, or full where every loss exceeds ``max_loss``.

    A mode that costs as much as dense attention is never chosen; of equal losses the cheaper mode is.

    Args:
        errors: ``[..., modes]`` of the sparse modes, any float dtype; NaN counts as infinite.
        costs: per mode, dense = 1.

    Returns:
        int64 ``[...]``: index of the mode, -1 for full.
    """
    cost = torch.tensor(costs, dtype=torch.float64)
    order = cost.argsort(stable=True)
    loss = errors.double().nan_to_num(nan=torch.inf, posinf=torch.inf) + price * cost
    loss = loss.masked_fill(cost >= 1, torch.inf)[..., order]
    least, at = loss.min(-1)  # the first of equal ones
    return order[at].masked_fill(~((least <= max_loss) & least.isfinite()), -1)


def relative_errors(exact: Tensor, outputs: Mapping[str, Tensor | None], kv_len: Tensor | None) -> dict[str, Tensor]:
    """Mean square error of every head's output over the mean square of the exact one: float64 [H] per entry.

    Args:
        exact: ``[B, N, H, D]``; outputs: the same, or None for zeros.
        kv_len: int ``[B]``; rows at or above it are padding and do not count.

    A head whose exact output is zero has error 0 where the output is zero too, else infinity.
    """
    valid = torch.ones(exact.shape[:2], dtype=torch.bool, device=exact.device)
    if kv_len is not None:
        valid = torch.arange(exact.shape[1], device=exact.device) < kv_len.view(-1, 1)

    def energy(x: Tensor) -> Tensor:
        # not times `valid`: padding may hold NaN
        return x.float().square().sum(-1).masked_fill(~valid[..., None], 0.0).double().sum((0, 1))

    whole = energy(exact)
    found = {}
    for name, out in outputs.items():
        wrong = whole if out is None else energy(out.float() - exact.float())
        found[name] = torch.where(wrong == 0, 0.0, wrong / whole)
    return found


def measure_costs(
    plans: Mapping[str, AttentionPlan], q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None, rounds: int
) -> dict[str, float]:
    """Seconds of attention with each plan over those of dense attention: medians of interleaved rounds.

    One round of everything goes before and does not count.
    """
    contenders: dict[str, AttentionPlan | None] = {"full": None, **plans}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, plan in contenders.items():
            _synchronise(q)
            start = time.perf_counter()
            attention(q, k, v, plan, kv_len=kv_len)
            _synchronise(q)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    dense = statistics.median(seconds.pop("full"))
    return {name: statistics.median(values) / dense for name, values in seconds.items()}


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
