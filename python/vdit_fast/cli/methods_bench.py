"""All sparse methods on the demo model at one density: quality, speed and planning, measured in turns.

The knob of each method is first searched on recorded attention calls of a dense run, so that their plans have equal
density; the density of the real run is then checked, and corrected once where it came out differently.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vdit_fast import report
from vdit_fast.accelerate import accelerate
from vdit_fast.cli.clip_quality import mean_quality, ratios
from vdit_fast.cli.matching import METHODS, TOLERANCE, Match, Method, match, method, planner_name
from vdit_fast.cli.recording import Call, Recording, Replayed, replay
from vdit_fast.config import Config
from vdit_fast.demo.architecture import FRAMES, HEIGHT, WIDTH
from vdit_fast.demo.model import demo_metadata, load_demo_model
from vdit_fast.demo.numbers import density_summary, spread, step_rows
from vdit_fast.demo.prompts import parse
from vdit_fast.demo.recorder import PlannedCall, Recorder
from vdit_fast.demo.run import token_grid
from vdit_fast.demo.sampler import DemoPipeline, Sample
from vdit_fast.planners import REGISTRY, Planner, from_dict

KIND = "vdit_fast.bench.methods"
PROMPTS = ("red circle right, blue square up",)
CALIBRATION = "white ring down, green triangle left"
"""The prompt of offline searches."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What is drawn and compared.

    Attributes:
        density: wanted share of the pairs that sparse calls read.
        dense_steps, dense_layers: the same for all methods.
        probes: most values of a knob that are tried.
        repeats: timed rounds; every round runs everything once, with the next prompt.
        minutes: no round begins that would probably end later; the first one always runs.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 12
    seed: int = 0
    density: float = 0.3
    dense_steps: int = 3
    dense_layers: int = 0
    probes: int = 9
    repeats: int = 3
    minutes: float = 60.0
    frames: int = FRAMES
    height: int = HEIGHT
    width: int = WIDTH

    def __post_init__(self) -> None:
        for name in ("steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; at least 1 is needed")
        if not 0 < self.density < 1:
            raise ValueError(f"density: {self.density}; must be between 0 and 1")
        if not 0 <= self.dense_steps < self.steps:
            raise ValueError(f"dense-steps: {self.dense_steps}; must leave sparse ones of the {self.steps} steps")
        if not self.prompts:
            raise ValueError("prompts: none; give at least one")
        for prompt in self.prompts:
            parse(prompt)


@dataclass
class Contestant:
    """One method with its knob set, and everything measured of it."""

    name: str
    method: Method
    planner: Planner
    found: Match
    replayed: Replayed
    runs: list[list[PlannedCall]] = field(default_factory=list)
    plans: list[tuple[int, Any]] = field(default_factory=list)
    drawn: list[Sample] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> list[PlannedCall]:
        """Those of the last run."""
        return self.runs[-1]


def run_methods(
    settings: Settings,
    *,
    names: Sequence[str] | None = None,
    weights: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Contestant]]:
    """Compare the planners ``names`` (None: all that have a knob); returns the document and what to draw from.

    Raises:
        ValueError: an unknown planner, prompt or number.
    """
    left_out: dict[str, str] = {}
    methods = _methods(names, left_out)
    searching = [name for name, line in methods.items() if line.searches]
    if searching and settings.dense_steps < 1:
        raise ValueError(
            f"dense-steps: {settings.dense_steps}; {', '.join(searching)} search in a dense step, the last of those "
            "that all methods share: at least 1 is needed, or other methods"
        )
    started = time.perf_counter()
    bench = _Bench(settings, weights, progress)
    bench.total = 1 + len(methods) + settings.repeats * (2 + len(methods))
    calls = bench.record()
    contestants = []
    for name, line in methods.items():
        bench.tell(f"{name}: knob {line.knob}")
        found = bench.prepared(name, line)
        one = bench.fit(name, found, calls, settings.density)
        if one.found.density is None:
            left_out[name] = "; ".join(one.replayed.reasons) or "no sparse call"
            bench.total -= settings.repeats
        else:
            contestants.append(one)
        bench.done += 1
    rounds = bench.rounds(contestants, calls)
    for one in contestants:
        one.replayed = replay(one.planner, calls, recall=True)
    document = {
        "kind": KIND,
        "version": 1,
        "settings": vars(settings) | bench.facts(),
        "rounds": len(rounds["stock"]),
        "baselines": {name: bench.baseline(name, rounds) for name in ("stock", "dense")},
        "methods": [bench.row(one, rounds) for one in contestants],
        "left_out": left_out,
        "notes": [
            "latents are pixels here: the demo model has no VAE, so the latent error is one of the unclamped clip"
        ],
        "model": demo_metadata(weights),
        "environment": report.environment(),
        "wall_seconds": time.perf_counter() - started,
    }
    return document, contestants


def _methods(names: Sequence[str] | None, left_out: dict[str, str]) -> dict[str, Method]:
    """The planners of this package with their knobs; those without one are written to ``left_out``."""
    own = {name for name, cls in REGISTRY.items() if cls.__module__.startswith("vdit_fast.")}
    known = sorted(own | set(METHODS))
    for name in names or ():
        if name not in known:
            raise ValueError(f"methods: {name!r} is unknown; known: {', '.join(known)}")
    found = {}
    for name in names or known:
        line = method(name)
        if line is None:
            left_out[name] = "no knob is known: add a line to METHODS in vdit_fast/cli/matching.py"
        else:
            found[name] = line
    if not found:
        raise ValueError("methods: none is left to compare")
    return found


class _Bench:
    """The model, the progress, and the runs."""

    def __init__(self, settings: Settings, weights: str | Path | None, progress: Progress | None) -> None:
        self.settings = settings
        self.progress = progress
        transformer: Any = load_demo_model(path=weights)
        self.transformer = transformer
        self.pipe = DemoPipeline(self.transformer)
        self.layers = int(self.transformer.config.num_layers)
        self.done, self.total = 0, 1

    def tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, what)

    def facts(self) -> dict[str, Any]:
        s = self.settings
        grid = token_grid(self.transformer, s.frames, s.height, s.width)
        return {
            "token_grid": list(grid),
            "tokens": grid[0] * grid[1] * grid[2],
            "layers": self.layers,
            "heads": int(self.transformer.config.num_attention_heads),
            "threads": torch.get_num_threads(),
        }

    # ------------------------------------------------------------------ runs
    def draw(self, prompt: str, more_seed: int = 0) -> Sample:
        s = self.settings
        size: dict[str, Any] = {"frames": s.frames, "height": s.height, "width": s.width}
        return self.pipe(prompt, steps=s.steps, seed=s.seed + more_seed, keep_latents=True, **size)

    def draw_with(self, planner: Planner | None, prompt: str) -> tuple[Sample, dict[str, Any]]:
        handle = accelerate(self.pipe, Config(attention=planner))
        try:
            return self.draw(prompt), handle.stats()
        finally:
            handle.remove()

    def record(self) -> list[Call]:
        """Attention calls of a dense run: three steps in a row, the middle and the last one; three layers."""
        self.tell("recording attention calls")
        first, last = self.settings.dense_steps, self.settings.steps - 1
        steps = {first - 1, first, min(first + 1, last), (first + last + 1) // 2, last}
        low = min(self.settings.dense_layers, self.layers - 1)
        layers = {low, (low + self.layers - 1) // 2, self.layers - 1}
        recording = Recording(steps=steps, layers=layers)
        self.draw_with(recording, self.settings.prompts[0])
        self.done += 1
        return recording.calls

    def planner(self, name: str, found: Method, value: Any) -> Planner:
        s = self.settings
        same = {"dense_steps": s.dense_steps - found.searches, "dense_layers": s.dense_layers}
        return from_dict({"method": planner_name(name), **same, **found.fixed, found.knob: value})

    def prepared(self, name: str, found: Method) -> Method:
        """The method after its offline search, on another prompt and seed than those it is judged by."""
        if found.prepare is None:
            return found
        base = self.planner(name, found, 1 - self.settings.density)
        more = found.prepare(self.pipe, lambda: self.draw(CALIBRATION, 1), base)
        return replace(found, fixed={**found.fixed, **more})

    def fit(self, name: str, found: Method, calls: list[Call], target: float) -> Contestant:
        """A method with the knob's value at which its plans of the recorded calls have the wanted density."""

        def density(value: Any) -> float | None:
            return replay(self.planner(name, found, value), calls).density

        best = match(found, density, target, self.settings.probes)
        planner = self.planner(name, found, best.value)
        return Contestant(name, found, planner, best, replay(planner, calls))

    def rounds(self, contestants: list[Contestant], calls: list[Call]) -> dict[str, list[Sample]]:
        """Run everything in turns; samples of the two baselines by name, those of the methods in ``contestants``."""
        s = self.settings
        samples: dict[str, list[Sample]] = {"stock": [], "dense": []}
        self.attention_seconds: list[float] = []
        begin = time.perf_counter()
        for number in range(max(s.repeats, len(s.prompts))):
            spent = time.perf_counter() - begin
            if number >= len(s.prompts) and spent * (number + 1) / number > 60 * s.minutes:
                break
            prompt, label = s.prompts[number % len(s.prompts)], f"round {number + 1}"
            self.tell(f"{label}: stock diffusers")
            samples["stock"].append(self.draw(prompt))
            self.done += 1
            self.tell(f"{label}: dense")
            drawn, stats = self.draw_with(None, prompt)
            samples["dense"].append(drawn)
            self.attention_seconds.append(sum(layer["attention_seconds"] for layer in stats["layers"]))
            self.done += 1
            for one in contestants:
                self.tell(f"{label}: {one.name}")
                self.measure(one, prompt)
                if number == 0:
                    self.correct(one, calls, prompt)
                self.done += 1
        return samples

    def measure(self, one: Contestant, prompt: str) -> None:
        recorder = Recorder(inner=one.planner, keep_layer=self.layers // 2)
        drawn, one.stats = self.draw_with(recorder, prompt)
        one.drawn.append(drawn)
        one.runs.append(recorder.calls)
        one.plans = recorder.plans

    def correct(self, one: Contestant, calls: list[Call], prompt: str) -> None:
        """Set the knob again where the run's density is not the recording's, aiming as much lower or higher."""
        got, wanted = self.densities(one)["sparse_calls"], self.settings.density
        if abs(got - wanted) <= TOLERANCE:
            return
        target = min(max(wanted * (one.found.density or wanted) / got, 0.02), 0.98)
        again = self.fit(one.name, one.method, calls, target)
        if again.found.density is None or again.found.value == one.found.value:
            return
        before = (one.planner, one.found, one.drawn, one.runs, one.plans, one.stats)
        one.planner, one.found, one.drawn, one.runs = again.planner, again.found, [], []
        self.measure(one, prompt)
        if abs(self.densities(one)["sparse_calls"] - wanted) > abs(got - wanted):
            one.planner, one.found, one.drawn, one.runs, one.plans, one.stats = before

    # ------------------------------------------------------------------ numbers
    def densities(self, one: Contestant) -> dict[str, Any]:
        facts = self.facts()
        return density_summary(one.calls, [], self.settings.steps, 2, facts["layers"], facts["heads"])

    def baseline(self, name: str, samples: dict[str, list[Sample]]) -> dict[str, Any]:
        found = {"seconds": spread([sample.seconds for sample in samples[name]])}
        if name == "dense":
            found["attention_seconds"] = spread(self.attention_seconds)
            found |= mean_quality(samples["dense"], samples["stock"], self.settings.prompts)
            found["speedup"] = ratios(samples["stock"], samples["dense"])
        return found

    def row(self, one: Contestant, samples: dict[str, list[Sample]]) -> dict[str, Any]:
        """One method's measured numbers."""
        summary = self.densities(one)
        all_calls = sum(layer["calls"] for layer in one.stats["layers"])
        dense_call = statistics.median(self.attention_seconds) / all_calls
        planning = statistics.median(sum(call.seconds for call in calls) for calls in one.runs)
        replayed = one.replayed
        return {
            "method": one.name,
            "knob": one.method.knob,
            "value": one.found.value,
            "config": one.planner.to_dict(),
            "matched": abs(summary["sparse_calls"] - self.settings.density) <= TOLERANCE,
            **mean_quality(one.drawn, samples["stock"], self.settings.prompts),
            "density": summary,
            "recall": replayed.recall,
            "best_recall": replayed.best,
            "output_error": replayed.error,
            "corrected": replayed.corrected,
            "planned_calls": len(one.calls),
            "plan_seconds": planning,
            "overhead": planning / (dense_call * len(one.calls)) if one.calls else 0.0,
            "attention_seconds": sum(layer["attention_seconds"] for layer in one.stats["layers"]),
            "seconds": spread([sample.seconds for sample in one.drawn]),
            "speedup": ratios(samples["stock"], one.drawn),
            "speedup_own": ratios(samples["dense"], one.drawn),
            "steps": step_rows(one.runs, [], one.drawn, samples["stock"]),
            "dense_reasons": _reasons(one.stats),
        }


def _reasons(stats: dict[str, Any]) -> dict[str, int]:
    total: dict[str, int] = {}
    for layer in stats["layers"]:
        for reason, count in (layer["dense"] | layer["unasked"] | layer["fallbacks"]).items():
            total[reason] = total.get(reason, 0) + count
    return total
