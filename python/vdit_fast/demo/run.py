"""The demo: draw one clip with stock diffusers and with ``accelerate``, measure both, and write everything down."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vdit_fast import report
from vdit_fast.demo.architecture import FRAMES, HEIGHT, WIDTH
from vdit_fast.demo.model import demo_metadata, load_demo_model
from vdit_fast.demo.numbers import density_summary, spread, step_rows
from vdit_fast.demo.pictures import draw, draw_plan, write_clips
from vdit_fast.demo.prompts import parse
from vdit_fast.demo.recorder import PlannedCall, Recorder
from vdit_fast.demo.sampler import GUIDANCE, DemoPipeline, Sample

if TYPE_CHECKING:
    from vdit_fast.config import Config

KIND = "vdit_fast.demo"
PROMPT = "red circle right, blue square up"
STEPS, REPEATS, WARMUP_STEPS = 12, 2, 1
NOISY = 0.15  # spread of equal runs that makes a note
Progress = Callable[[int, int, str], None]


def run_demo(
    prompt: str = PROMPT,
    config: str | Config = "balanced",
    *,
    label: str | None = None,
    steps: int = STEPS,
    seed: int = 0,
    repeats: int = REPEATS,
    out: str | Path = "vdit_fast_demo",
    guidance: float = GUIDANCE,
    frames: int = FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    model: torch.nn.Module | None = None,
    weights: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw ``prompt`` dense and accelerated, ``repeats`` times in turns; write clips, pictures and numbers to ``out``.

    The dense side is the untouched diffusers model (torch SDPA). The seconds are those of the denoising loop.

    Args:
        prompt: see :mod:`vdit_fast.demo.prompts`.
        config: a preset's name, a YAML/JSON file or a Config; ``label`` is how pictures and tables call it.
        model: a transformer to use instead of the packaged one; ``weights`` names another weight file.
        progress: called with ``(steps done, steps, what)``.

    Returns:
        The document that is also written to ``out/results.json``; its ``files`` are relative to ``out``.

    Raises:
        ValueError: an unknown word or preset, or a number out of range.
        FileNotFoundError: the installation has no demo weights.
        ImportError: a missing extra (``diffusers``, ``plots`` or ``video``).
    """
    from vdit_fast.accelerate import accelerate
    from vdit_fast.config import Config

    parse(prompt)
    if repeats < 1:
        raise ValueError(f"repeats: {repeats}; at least 1 is needed")
    if steps < 1:
        raise ValueError(f"steps: {steps}; at least 1 is needed")
    found = Config.of(config)
    label = label or (Path(config).stem if isinstance(config, str) else "custom")
    transformer: Any = load_demo_model(path=weights) if model is None else model
    metadata = demo_metadata(weights) if model is None else {}
    pipe = DemoPipeline(transformer)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    total, done = 2 * (WARMUP_STEPS + steps * repeats), 0

    def run(what: str, count: int) -> Sample:
        nonlocal done

        def tick(step: int, of: int) -> None:
            if progress is not None:
                progress(done + step, total, what)

        size = {"frames": frames, "height": height, "width": width}
        drawn = pipe(prompt, steps=count, seed=seed, guidance=guidance, keep_latents=True, progress=tick, **size)
        done += count
        return drawn

    layers = int(transformer.config.num_layers)
    recorder: Recorder | None = None
    explained: dict[str, Any] = {}

    def run_fast(what: str, count: int, config: Config = found) -> Sample:
        nonlocal recorder, explained
        watched, recorder = _watched(config, layers // 2)
        handle = accelerate(pipe, watched)
        try:
            drawn = run(what, count)
            explained = {"text": handle.report()} | handle.stats()
        finally:
            handle.remove()
        return drawn

    started = time.perf_counter()
    run("warm-up, dense", WARMUP_STEPS)
    run_fast(f"warm-up, {label}", WARMUP_STEPS, _forced(found))
    dense: list[Sample] = []
    fast: list[Sample] = []
    runs: list[list[PlannedCall]] = []
    for turn in range(1, repeats + 1):
        dense.append(run(f"dense {turn}/{repeats}", steps))
        fast.append(run_fast(f"{label} {turn}/{repeats}", steps))
        runs += [recorder.calls] if recorder else []
    calls, plans = (recorder.calls, recorder.plans) if recorder else ([], [])

    forecast = list((explained["cache"] or {}).get("forecast", {}))
    grid = token_grid(transformer, frames, height, width)
    heads = int(transformer.config.num_attention_heads)
    branches = 1 if guidance == 1 else 2
    dense_seconds, fast_seconds = ([s.seconds for s in runs] for runs in (dense, fast))
    comparison = report.compare_clips(fast[0].clip, dense[0].clip)
    results: dict[str, Any] = {
        "kind": KIND,
        "version": 1,
        "prompt": prompt,
        "label": label,
        "config": found.to_dict(),
        "settings": {
            "steps": steps,
            "seed": seed,
            "repeats": repeats,
            "guidance": guidance,
            "frames": frames,
            "height": height,
            "width": width,
            "token_grid": list(grid),
            "tokens": grid[0] * grid[1] * grid[2],
            "layers": layers,
            "heads": heads,
            "threads": torch.get_num_threads(),
        },
        "model": metadata,
        "speed": {
            "dense_seconds": spread(dense_seconds),
            "fast_seconds": spread(fast_seconds),
            "speedup": spread([d / f for d, f in zip(dense_seconds, fast_seconds, strict=True)])
            | {"median": statistics.median(dense_seconds) / statistics.median(fast_seconds)},
        },
        "density": density_summary(calls, forecast, steps, branches, layers, heads),
        "steps": step_rows(runs, forecast, fast, dense),
        "quality": comparison.to_dict(),
        "latent_relative_l2": [
            report.relative_l2(a, b) for a, b in zip(fast[0].latents, dense[0].latents, strict=True)
        ],
        "per_frame_psnr": comparison.to_dict()["psnr_per_frame"],
        "report": explained,
        "environment": report.environment(),
        "wall_seconds": time.perf_counter() - started,
    }
    results["notes"] = notes(results)
    files = write_clips(dense[0].clip, fast[0].clip, results, folder)
    files += draw_plan(plans, grid, results, folder)
    files += draw(results, folder)
    results["files"] = [file.name for file in files] + ["results.json"]
    report.write_json(folder / "results.json", results)
    return results


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers: calls that stayed dense against the wish, noise."""
    found = []
    wanted = results["config"]["attention"] is not None
    if wanted and not any(step["mode"] == "sparse" for step in results["steps"]):
        reasons: Counter[str] = Counter()
        for layer in results["report"].get("layers", []):
            reasons.update(layer["dense"])
            reasons.update(layer["unasked"])
            reasons.update(layer["fallbacks"])
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        found.append(f"no attention call was sparse ({why}): a speed-up here is not one of sparse attention")
    for name in ("dense", "fast"):
        row = results["speed"][f"{name}_seconds"]
        if row["max"] > (1 + NOISY) * row["min"]:
            spread = f"{row['min']:.1f} to {row['max']:.1f} s"
            found.append(f"the {name} runs took {spread}: the machine was busy, repeat the demo when it is idle")
    if len(results["speed"]["dense_seconds"]["all"]) == 1:
        found.append("one run of each side: nothing is known about the noise of the timings (--repeats 3)")
    return found


def _watched(config: Config, layer: int) -> tuple[Config, Recorder | None]:
    """The config with a recorder around its planner, if it has one."""
    if config.attention is None:
        return config, None
    recorder = Recorder(inner=config.attention, keep_layer=layer)
    return replace(config, attention=recorder), recorder


def _forced(config: Config) -> Config:
    """The config with a planner that takes any number of steps: the warm-up has others than the runs."""
    planner: Any = config.attention
    return replace(config, attention=replace(planner, force=True)) if hasattr(planner, "force") else config


def token_grid(model: Any, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of a clip of so many pixels."""
    pt, ph, pw = model.config.patch_size
    return frames // pt, height // ph, width // pw
