"""Whole configurations on the demo model, measured in turns: what each part brings alone, and all together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vdit_fast import report
from vdit_fast.accelerate import accelerate
from vdit_fast.cli.clip_quality import mean_quality, ratios
from vdit_fast.cli.combinations import COMBINATIONS
from vdit_fast.cli.peak_memory import PeakMemory
from vdit_fast.config import Config
from vdit_fast.demo.architecture import FRAMES, HEIGHT, WIDTH
from vdit_fast.demo.model import demo_metadata, load_demo_model
from vdit_fast.demo.numbers import spread
from vdit_fast.demo.prompts import parse
from vdit_fast.demo.run import token_grid
from vdit_fast.demo.sampler import DemoPipeline, Sample

KIND = "vdit_fast.bench.combinations"
STOCK, COMPILED = "stock", "stock, compiled"
PROMPTS = ("red circle right, blue square up",)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What is drawn and compared.

    Attributes:
        repeats: timed rounds; every round runs everything once, with the next prompt.
        minutes: no round begins that would probably end later; the first of every prompt always runs.
        compiled: also run stock diffusers with its blocks compiled.
        goal, floor: the speed-up over stock, and the PSNR in dB that it must keep, that the verdict looks for.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 12
    seed: int = 0
    repeats: int = 3
    minutes: float = 60.0
    compiled: bool = True
    goal: float = 4.0
    floor: float = 25.0
    frames: int = FRAMES
    height: int = HEIGHT
    width: int = WIDTH

    def __post_init__(self) -> None:
        for name in ("steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; at least 1 is needed")
        if not self.prompts:
            raise ValueError("prompts: none; give at least one")
        for prompt in self.prompts:
            parse(prompt)


@dataclass
class Contestant:
    """One configuration, and everything measured of it."""

    name: str
    group: str
    config: Config | None
    drawn: list[Sample] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


def run_combinations(
    settings: Settings,
    *,
    names: list[str] | None = None,
    more: Mapping[str, Config] | None = None,
    weights: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the built-in combinations ``names`` (None: all) and ``more`` configurations; returns the document.

    Raises:
        ValueError: an unknown combination or prompt, or a number out of range.
    """
    for name in names or ():
        if name not in COMBINATIONS:
            raise ValueError(f"only: {name!r} is unknown; known: {', '.join(map(repr, COMBINATIONS))}")
    chosen = [name for name in COMBINATIONS if names is None or name in names]
    contestants = [Contestant(STOCK, "baseline", None)]
    contestants += [Contestant(COMPILED, "baseline", None)] if settings.compiled else []
    contestants += [Contestant(name, COMBINATIONS[name][0], Config.from_dict(COMBINATIONS[name][1])) for name in chosen]
    contestants += [Contestant(name, "given", config) for name, config in (more or {}).items()]
    started = time.perf_counter()
    bench = _Bench(settings, weights, progress, len(contestants))
    flops = bench.flops()
    bench.rounds(contestants)
    stock = contestants[0]
    rows = [bench.row(one, contestants, flops) for one in contestants]
    grid = token_grid(bench.model, settings.frames, settings.height, settings.width)
    return {
        "kind": KIND,
        "version": 1,
        "settings": vars(settings)
        | {
            "token_grid": list(grid),
            "tokens": grid[0] * grid[1] * grid[2],
            "layers": int(bench.model.config.num_layers),
            "threads": torch.get_num_threads(),
        },
        "rounds": len(stock.drawn),
        "rows": rows,
        "model": demo_metadata(weights),
        "environment": report.environment(),
        "wall_seconds": time.perf_counter() - started,
    }


class _Bench:
    """The models, the progress, and the runs."""

    def __init__(
        self, settings: Settings, weights: str | Path | None, progress: Progress | None, contestants: int
    ) -> None:
        self.settings = settings
        self.progress = progress
        transformer: Any = load_demo_model(path=weights)
        self.model = transformer
        self.pipe = DemoPipeline(transformer)
        self.compiled: DemoPipeline | None = None
        self.done, self.total = 0, settings.repeats * contestants

    def tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, what)

    def draw(self, pipe: DemoPipeline, prompt: str, steps: int | None = None) -> Sample:
        s = self.settings
        size: dict[str, Any] = {"frames": s.frames, "height": s.height, "width": s.width}
        return pipe(prompt, steps=steps or s.steps, seed=s.seed, keep_latents=True, **size)

    def flops(self) -> int:
        """Floating-point operations of a whole stock run: products of matrices and attention."""
        from torch.utils.flop_counter import FlopCounterMode

        self.tell("counting operations")
        with FlopCounterMode(display=False) as counter:
            self.draw(self.pipe, self.settings.prompts[0], steps=1)
        return int(counter.get_total_flops()) * self.settings.steps

    def rounds(self, contestants: list[Contestant]) -> None:
        """Run everything in turns."""
        s = self.settings
        begin = time.perf_counter()
        for number in range(max(s.repeats, len(s.prompts))):
            spent = time.perf_counter() - begin
            if number >= len(s.prompts) and spent * (number + 1) / number > 60 * s.minutes:
                break
            for one in contestants:
                self.tell(f"round {number + 1}: {one.name}")
                self.run(one, s.prompts[number % len(s.prompts)])
                self.done += 1

    def run(self, one: Contestant, prompt: str) -> None:
        pipe = self._pipe(one)
        handle = accelerate(pipe, one.config) if one.config is not None else None
        try:
            with PeakMemory(next(self.model.parameters()).device) as memory:
                one.drawn.append(self.draw(pipe, prompt))
            one.peaks.append(memory.nbytes)
            one.stats = handle.stats() if handle is not None else {}
        finally:
            if handle is not None:
                handle.remove()

    def _pipe(self, one: Contestant) -> DemoPipeline:
        if one.name != COMPILED:
            return self.pipe
        if self.compiled is None:
            model = copy.deepcopy(self.model)
            model.compile_repeated_blocks(fullgraph=True)
            self.compiled = DemoPipeline(model)
            self.draw(self.compiled, self.settings.prompts[0], steps=1)  # compiles
        return self.compiled

    def row(self, one: Contestant, all_: list[Contestant], flops: int) -> dict[str, Any]:
        """One configuration's measured numbers."""
        s = self.settings
        stock = all_[0]
        seconds = spread([sample.seconds for sample in one.drawn])
        row: dict[str, Any] = {
            "name": one.name,
            "group": one.group,
            "config": one.config.to_dict() if one.config is not None else None,
            "seconds": seconds,
            "speedup": ratios(stock.drawn, one.drawn),
            "dense_equivalent_gflops": flops / seconds["median"] / 1e9,
            "peak_bytes": max((peak for peak in one.peaks if peak is not None), default=None),
        }
        compiled = next((other for other in all_ if other.name == COMPILED), None)
        if compiled is not None:
            row["speedup_compiled"] = ratios(compiled.drawn, one.drawn)
        if one is not stock:
            row |= mean_quality(one.drawn, stock.drawn, s.prompts)
        if one.stats:
            row["attention"] = _attention_share(one.stats, s.steps)
            row["cache"] = one.stats["cache"]
            row["fallbacks"] = sum(sum(layer["fallbacks"].values()) for layer in one.stats["layers"])
        return row


def _attention_share(stats: dict[str, Any], steps: int) -> float:
    """Pairs of queries and keys that were computed, over those of a run that computes everything densely."""
    layers = stats["layers"]
    computed = sum((layer["mean_density"] or 0.0) * layer["calls"] for layer in layers)
    return float(computed / (2 * steps * len(layers)))  # two guidance branches
