"""Section "timings": one attention problem, this library and its peers in turn, with the error of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vdit_fast

from . import machine, timing
from .peers import Peer, available, leaves
from .problems import Problem
from .timing import Effort
from .workloads import Workload, build, gradient_error, relative_error

OWN, OWN_DENSE, OWN_PLAIN = "vdit_fast", "vdit_fast dense", "vdit_fast without stand-ins"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


class NotServed(Exception):
    """The library refuses the problem; the text is its own."""


def run(problem: Problem, *, dtype: torch.dtype, device: str, effort: Effort, load_clocks: bool) -> dict[str, Any]:
    """Time one problem.

    Returns:
        A JSON-ready result. ``wrong`` names contenders whose error is above the tolerance; ``skipped_peers`` has the
        reasons of those that are missing.

    Raises:
        NotServed: the library has no kernel for the problem.
    """
    w = build(problem, dtype, device)
    contenders = own(w)
    peers, skips = available(w, device)
    contenders |= peers
    calls = {}
    errors: dict[str, float] = {}
    for name, peer in contenders.items():
        try:
            calls[name], errors[name] = prepare(w, peer)
        except Exception as error:
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            if name == OWN:
                if isinstance(error, NotImplementedError):  # torch's, for an operator without a CUDA kernel
                    raise NotServed(text) from error
                raise
            skips[name] = text
            if not machine.alive(device):
                raise
    with torch.no_grad() if not problem.backward else torch.enable_grad():
        times = timing.interleaved(calls, effort, device)
        peak = timing.peak_bytes(calls[OWN], device)
        clocks = clocks_under_load(calls[OWN], min(times[OWN])) if load_clocks else None
        kernels = kernel_names(calls[OWN], device)
    rows = {name: row(w, contenders[name], times[name], errors[name]) for name in calls}
    for name, entry in rows.items():
        if name != OWN:
            entry["ratio"] = timing.ratio(times[name], times[OWN])  # how much faster this library is
    limit = TOLERANCE[dtype] * (3 if problem.backward else 1)
    return {
        "density": w.density,
        "plan_density": 1.0 if w.plan is None else float(w.plan.density),
        "plan_ms": w.plan_ms,
        "dense_flop": problem.flop,
        "goal_tflops": problem.goal,
        "contenders": rows,
        "skipped_peers": skips,
        "wrong": [name for name, e in errors.items() if not e <= limit],  # NaN is wrong too
        "peak_bytes": peak,
        "clocks_under_load": clocks,
        "kernels": kernels,
    }


def own(w: Workload) -> dict[str, Peer]:
    """This library on the problem, dense for comparison, and without stand-ins where the problem has them."""
    q, k, v = inputs = leaves(w)

    def contender(plan: Any, same: bool, share: float) -> Peer:
        return Peer(lambda: vdit_fast.attention(q, k, v, plan), same, share, lambda out: out, inputs)

    found = {OWN: contender(w.plan, True, w.density)}
    if w.plan is not None:
        found[OWN_DENSE] = contender(None, False, 1.0)
    if w.problem.kind == "stand-ins":
        p = w.problem
        plain = vdit_fast.AttentionPlan.from_block_mask(w.keep, p.block, p.block, lq=p.length, lk=p.length)
        found[OWN_PLAIN] = contender(plain, False, w.density)
    return found


def prepare(w: Workload, peer: Peer) -> tuple[Callable[[], Any], float]:
    """The call that is timed, and the error of its first result (0 where it computes something else)."""
    if not w.problem.backward:
        with torch.no_grad():
            out = peer.call()
            error = relative_error(w, peer.answer(out)) if peer.same else 0.0
        return peer.call, error
    out = peer.call()
    grad = torch.randn(w.q.shape, device=w.q.device, generator=_generator(w.q.device)).to(w.q.dtype)
    given = grad if out.shape == grad.shape else grad.transpose(1, 2)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, peer.leaves, given, retain_graph=True)

    return backward, gradient_error(w, grad, backward()) if peer.same else 0.0


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(5)


def row(w: Workload, peer: Peer, series: list[float], error: float) -> dict[str, Any]:
    """Times and rates: of the dense problem (what a user gains) and of what was executed."""
    entry = timing.summary(series)
    dense = w.problem.flop / entry["ms"] / 1e9
    return entry | {
        "dense_tflops": dense,
        "executed_tflops": peer.share * dense,
        "density": peer.share,
        "error": error if peer.same else None,
    }


def clocks_under_load(call: Callable[[], Any], milliseconds: float) -> dict[str, float] | None:
    """Clocks while about a second of calls is queued."""
    for _ in range(min(500, max(3, int(1000 / max(milliseconds, 1e-3))))):
        call()
    time.sleep(0.3)
    found = machine.clocks()
    torch.cuda.synchronize()
    return found


def kernel_names(call: Callable[[], Any], device: str) -> list[str] | str:
    """Kernels that a call launches: a portable kernel on a Hopper GPU must not go unseen."""
    if device != "cuda":
        return "no CUDA device"
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the profiler does not work here: {str(error)[:200]}"
    return sorted({e.key[:160] for e in found.key_averages() if "vdit" in e.key})
