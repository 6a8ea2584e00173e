"""The stages of a conversion: answered calls, layers by themselves, the choice of layers, the whole model."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from matching import Call, asked, matching_loss, noised_clip, trajectory
from torch import Tensor, nn
from train import Muon  # of the demo model

from vdit_fast.linear import SelectiveTransfer

LOG_EVERY = 25  # steps
_ATTENTION = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")


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


@dataclass
class Pool:
    """Answered calls to learn from, grown as long as there is time for it."""

    original: nn.Module
    sizes: tuple[tuple[int, int], ...]
    rng: random.Random
    calls: list[Call] = field(default_factory=list)

    def grow(self, clock: Clock, share: float, model: nn.Module | None = None) -> None:
        """Add calls of every size in turn, by noised clips and by sampling runs: of the original, or of ``model``."""
        before = len(self.calls)
        for turn, _ in clock.until(share):
            frames, side = self.sizes[turn % len(self.sizes)]
            if model is None:
                run = trajectory(self.original, self.rng, frames, side)
            else:
                run = [asked(self.original, call) for call in trajectory(model, self.rng, frames, side)]
            self.calls += run
            self.calls += [asked(self.original, noised_clip(self.rng, frames, side)) for _ in range(len(run) // 2)]
        clock.log("pool", len(self.calls) - before, source="original" if model is None else "converted model")

    def draw(self) -> Call:
        return self.rng.choice(self.calls)


# ------------------------------------------------------------------------------------------------------ single layers
class Taps:
    """What goes into and comes out of the attention of some layers of a model, at its last call."""

    def __init__(self, model: Any, layers: Iterable[int]) -> None:
        self.seen: dict[int, tuple[Tensor, Any, Tensor]] = {}
        self.hooks = [
            model.blocks[layer].attn1.register_forward_hook(self._note(layer), with_kwargs=True) for layer in layers
        ]

    def _note(self, layer: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            named = dict(zip(_ATTENTION, args, strict=False)) | kwargs
            self.seen[layer] = named["hidden_states"], named["rotary_emb"], output

        return note

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def layers_alone(
    original: Any,
    student: Any,
    layers: Iterable[int],
    parameters: Callable[[int], list[nn.Parameter]],
    pool: Pool,
    clock: Clock,
    share: float,
    *,
    stage: str,
    rate: float,
    rounds: int = 4,
) -> dict[int, float]:
    """Train every layer by itself: its linear attention against the original's softmax attention, on what the original
    feeds it. The loss is relative to the mean square of the output. Returns the last mean losses.

    One forward of the original serves all layers; a few of them are kept and seen ``rounds`` times.
    """
    layers = list(layers)
    optimisers = {layer: torch.optim.Adam(parameters(layer), rate, betas=(0.9, 0.99)) for layer in layers}
    taps, kept = Taps(original, layers), []
    running: dict[int, list[float]] = {layer: [] for layer in layers}
    means: dict[int, float] = {}
    for step, progress in clock.until(share):
        if step % rounds == 0:
            with torch.no_grad():
                original(**pool.draw().arguments())
            kept = [*kept[-7:], taps.seen]
            taps.seen = {}
        seen = kept[-1] if step % rounds == 0 else pool.rng.choice(kept)
        for layer in layers:
            hidden, rotary, want = seen[layer]
            optimiser = optimisers[layer]
            optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * min(1.0, 2 * (1 - progress))
            got = student.blocks[layer].attn1(hidden, rotary_emb=rotary)
            loss = (got - want).square().mean() / want.square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            running[layer].append(float(loss))
        if (step + 1) % LOG_EVERY == 0:
            means = {layer: round(sum(values) / len(values), 4) for layer, values in running.items()}
            clock.log(stage, step + 1, loss=means)
            running = {layer: [] for layer in layers}
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
    rate: float = 0.02,
    map_rate: float = 1e-3,
    weight: float = 0.01,
    count_weight: float = 0.01,
) -> tuple[int, ...]:
    """Find out which layers become linear: r and the maps learn, the model's weights stay. Returns the layers."""
    maps = [*transfer.q_maps, *transfer.k_maps]
    groups = [{"params": [transfer.ratio], "lr": rate}, {"params": maps, "lr": map_rate}]
    optimiser, running = torch.optim.Adam(groups, betas=(0.9, 0.99)), []
    for step, progress in clock.until(share):
        alpha = 20 + (2 - 20) * progress
        loss = matching_loss(student, pool.draw())
        total = loss + weight * transfer.penalty(alpha) + count_weight * transfer.count_penalty()
        total.backward()
        optimiser.step()
        transfer.clamp_()
        optimiser.zero_grad(set_to_none=True)
        running.append(float(loss))
        if (step + 1) % LOG_EVERY == 0:
            ratio = [round(float(r), 3) for r in transfer.ratio]
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
    muon_rate: float,
    rate: float,
) -> float:
    """Train these weights and maps of the whole converted model by matching. Returns the last mean loss."""
    matrices = [p for p in parameters if p.ndim == 2]
    muon = Muon(matrices, muon_rate)
    rest = [p for p in parameters if p.ndim != 2] + maps
    adam, running, mean = torch.optim.Adam(rest, rate, betas=(0.9, 0.99)), [], float("nan")
    for step, progress in clock.until(share):
        decay = min(1.0, (step + 1) / 10) * min(1.0, 1.25 * (1 - progress))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = muon_rate * decay, rate * decay
        loss = matching_loss(student, pool.draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step()
        adam.step()
        muon.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        running.append(float(loss))
        if (step + 1) % LOG_EVERY == 0:
            mean = sum(running) / len(running)
            clock.log("match", step + 1, loss=round(mean, 6))
            running.clear()
    return mean
