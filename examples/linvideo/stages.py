"""The stages of a conversion: answered calls, layers by themselves, the choice of layers, the whole model."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from matching import Call, asked, matching_loss, noised_clip, trajectory
from torch import Tensor, nn
from train import Muon  # of the demo model

from vdit_fast.linear import SelectiveTransfer

LOG_EVERY = 20  # steps


@dataclass
class Clock:
    """Shares of one time budget, and a log of what happened in them."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def until(self, share: float) -> Iterator[tuple[int, float]]:
        """(step, progress from 0 to 1) until this share of the whole budget is spent."""
        begin, end = time.monotonic(), self.started + share * self.seconds
        for step in itertools.count():
            now = time.monotonic()
            if now >= end:
                return
            yield step, (now - begin) / max(end - begin, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside costs nothing of the budget."""
        begin = time.monotonic()
        yield
        self.started += time.monotonic() - begin

    def log(self, stage: str, step: int, **values: Any) -> None:
        row = {"stage": stage, "step": step, "seconds": round(time.monotonic() - self.started, 1), **values}
        self.rows.append(row)
        print(json.dumps(row), flush=True)


Size = tuple[int, int]
"""Frames and side in pixels."""


@dataclass
class Pool:
    """Answered calls to learn from, by size.

    Attributes:
        sizes: how often a call of each size is drawn, the smallest first.
        sampled: the sizes that sampling runs have; the others get noised clips only, as a run costs many calls.
    """

    original: nn.Module
    sizes: dict[Size, float]
    sampled: tuple[Size, ...]
    rng: random.Random
    calls: dict[Size, list[Call]] = field(default_factory=dict)

    def grow(self, clock: Clock, share: float, model: nn.Module | None = None) -> None:
        """Add sampling runs, of the original or of ``model``, and noised clips of all sizes, until a share is spent."""
        before = self.count()
        for turn, _ in clock.until(share):
            size = self.sampled[turn % len(self.sampled)]
            run = trajectory(model or self.original, self.rng, *size)
            self.add(size, run if model is None else [asked(self.original, call) for call in run])
            for size in self.sizes:
                self.add_clip(size)
        clock.log("pool", self.count() - before, source="original" if model is None else "converted model")

    def add(self, size: Size, calls: list[Call]) -> None:
        self.calls.setdefault(size, []).extend(calls)

    def add_clip(self, size: Size) -> None:
        self.add(size, [asked(self.original, noised_clip(self.rng, *size))])

    def count(self) -> int:
        return sum(map(len, self.calls.values()))

    def pick(self) -> Size:
        return self.rng.choices(list(self.sizes), list(self.sizes.values()))[0]

    def draw(self, size: Size) -> Call:
        return self.rng.choice(self.calls[size])


def decayed(optimiser: torch.optim.Optimizer, rates: list[float], step: int, progress: float) -> None:
    """Set the rates of a step: ten steps of warm-up, then constant, and over the last two thirds linear to 0."""
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * min(1.0, (step + 1) / 10) * min(1.0, 1.5 * (1 - progress))


# ------------------------------------------------------------------------------------------------------ single layers
class _Enough(Exception):
    """The last tapped part has run."""


class Taps:
    """What goes into and comes out of some parts of a model."""

    def __init__(self, model: Any, parts: dict[int, nn.Module]) -> None:
        self.model = model
        self.seen: dict[int, tuple[Any, dict[str, Any], Tensor]] = {}
        self.last = max(parts)
        self.hooks = [part.register_forward_hook(self._note(layer), with_kwargs=True) for layer, part in parts.items()]

    def _note(self, layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            self.seen[layer] = args, kwargs, output
            if layer == self.last:
                raise _Enough

        return note

    @torch.no_grad()
    def __call__(self, call: Call) -> dict[int, tuple[Any, dict[str, Any], Tensor]]:
        """(arguments, arguments by name, output) of every part; what follows the last one does not run."""
        self.seen = {}
        with suppress(_Enough):
            self.model(**call.arguments())
        return self.seen

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def layers_alone(
    original: Any,
    student: Any,
    part: Callable[[Any, int], nn.Module],
    groups: dict[int, list[dict[str, Any]]],
    pool: Pool,
    clock: Clock,
    share: float,
    *,
    stage: str,
    rounds: int = 6,
) -> dict[int, float]:
    """Train a part of every layer by itself against the original's, on what the original feeds it.

    The loss is the square error relative to what the part adds to its input (``part`` is a block) or gives (another
    part). One forward of the original serves all layers; the last eight are kept, and ``rounds`` steps follow each.

    Args:
        part: (model, layer) -> its part.
        groups: layer -> parameter groups of its optimiser.

    Returns:
        the last mean losses.
    """
    optimisers = {layer: torch.optim.Adam(given, betas=(0.9, 0.99)) for layer, given in groups.items()}
    rates = {layer: [group["lr"] for group in optimisers[layer].param_groups] for layer in groups}
    taps, kept = Taps(original, {layer: part(original, layer) for layer in groups}), []
    running: dict[int, list[float]] = {layer: [] for layer in groups}
    means: dict[int, float] = {}
    for step, progress in clock.until(share):
        if step % rounds == 0:
            kept = [*kept[-7:], taps(noised_clip(pool.rng, *pool.rng.choice(list(pool.sizes))))]
        seen = kept[-1] if step % rounds == 0 else pool.rng.choice(kept)
        for layer, optimiser in optimisers.items():
            args, kwargs, want = seen[layer]
            decayed(optimiser, rates[layer], step, progress)
            got = part(student, layer)(*args, **kwargs)
            given = args[0] if part(student, layer) is student.blocks[layer] else 0
            loss = (got - want).square().mean() / (want - given).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            running[layer].append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            means = {layer: round(sum(values) / len(values), 4) for layer, values in running.items()}
            clock.log(stage, step + 1, loss=means)
            running = {layer: [] for layer in groups}
    taps.remove()
    return means


# ------------------------------------------------------------------------------------------------------ whole model
def select(
    student: Any,
    transfer: SelectiveTransfer,
    pool: Pool,
    clock: Clock,
    share: float,
    *,
    rate: float = 0.03,
    map_rate: float = 0.01,
    weight: float = 0.01,
    count_weight: float = 0.01,
) -> tuple[int, ...]:
    """Find out which layers become linear: r and the maps learn, the model's weights stay. Returns the layers."""
    maps = [*transfer.q_maps, *transfer.k_maps]
    groups = [{"params": [transfer.ratio], "lr": rate}, {"params": maps, "lr": map_rate}]
    optimiser, running = torch.optim.Adam(groups, betas=(0.9, 0.99)), []
    for step, progress in clock.until(share):
        alpha = 20 + (2 - 20) * progress
        loss = matching_loss(student, pool.draw(next(iter(pool.sizes))))  # r needs many steps
        total = loss + weight * transfer.penalty(alpha) + count_weight * transfer.count_penalty()
        total.backward()
        optimiser.step()
        transfer.clamp_()
        optimiser.zero_grad(set_to_none=True)
        running.append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            ratio = [round(r, 3) for r in transfer.ratio.tolist()]
            clock.log("select", step + 1, loss=round(sum(running) / len(running), 5), ratio=ratio)
            running.clear()
    return transfer.round_()


def match(
    student: Any,
    parameters: list[nn.Parameter],
    maps: list[nn.Parameter],
    pool: Pool,
    clock: Clock,
    share: float,
    *,
    muon_rate: float = 0.0015,
    rate: float = 5e-4,
    map_rate: float = 3e-3,
) -> float:
    """Train these weights and maps of the whole converted model by matching. Returns the last mean loss."""
    matrices = [p for p in parameters if p.ndim == 2]
    muon = Muon(matrices, muon_rate)
    rest = [p for p in parameters if p.ndim != 2]
    groups = [{"params": rest, "lr": rate}, {"params": maps, "lr": map_rate}]
    adam, running, mean = torch.optim.Adam(groups, betas=(0.9, 0.99)), [], float("nan")
    for step, progress in clock.until(share):
        decayed(muon, [muon_rate], step, progress)
        decayed(adam, [rate, map_rate], step, progress)
        size = pool.pick()
        if step % 3 == 0:
            pool.add_clip(size)
        loss = matching_loss(student, pool.draw(size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*rest, *maps], 1.0)
        muon.step()
        adam.step()
        muon.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        running.append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            mean = sum(running) / len(running)
            clock.log("match", step + 1, loss=round(mean, 6))
            running.clear()
    return mean
