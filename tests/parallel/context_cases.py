"""What the ranks of ``test_context_parallel.py`` run: diffusers cuts the rows, this package exchanges them."""

from __future__ import annotations

from typing import Any

import planner_settings
import tiny
import torch
import torch.distributed as dist
from torch import nn
from ulysses_cases import Case, built, far, generate, refused
from ulysses_cases import run as run_cases

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.parallel import sequence_parallel


def enable(model: nn.Module, **settings: Any) -> None:
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: dist.get_world_size()  # type: ignore[assignment]  # it divides by it
    model.enable_parallelism(config=ContextParallelConfig(**settings))  # type: ignore[operator]


def planned(
    planner: str, first: str, grid: tuple[int, int, int], heads: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """A planner's generation alone and under diffusers' plan, enabled before or after ``accelerate``."""
    model, inputs = built("wan", heads, grid)
    rows = {"modes": ("dm" * heads)[:heads]} if planner == "sparse_vdit" else {}
    config = planner_settings.config(planner, **rows)
    handle = planner_settings.plugged(model, config)
    want = generate(model, inputs)
    if first == "parallel":
        handle.remove()
    enable(model, ulysses_degree=dist.get_world_size(), **settings)
    if first == "parallel":
        handle = planner_settings.plugged(model, config)
    handle.reset()
    got = generate(model, inputs)
    layers = handle.stats()["layers"]
    ulysses: Any = handle.roots[0].session.around_heads["sequence"]
    found = {
        "far": far(got, want),
        "served": not any(layer["fallbacks"] for layer in layers) and ulysses.calls == 8,
        "report": "sequence parallelism: rank" in handle.report(),
        "twice": refused(lambda: sequence_parallel(handle)),
    }
    handle.remove()
    stock = generate(model, inputs)
    found["stock"] = all(x.isfinite().all() for x in stock) and not tiny.served(model)
    return found


def compiled() -> dict[str, Any]:
    """Blocks compiled without a break: the exchange lies inside of the package's operator."""
    model, inputs = built("wan", 4, (4, 7, 9))
    handle = planner_settings.plugged(model, planner_settings.config("draft"))
    want = generate(model, inputs)
    enable(model, ulysses_degree=2)
    tiny.run(model, inputs)  # the first call of diffusers' own hook looks at signatures, which no graph can hold
    handle.roots[0].session.around_heads["sequence"].calls = 0
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    handle.reset()
    got = generate(model, inputs)
    calls = handle.stats()["parallel"]["sequence"]["calls"]
    return {"far": far(got, want), "calls": calls}


def aside() -> dict[str, Any]:
    """What is not served runs through the stock processors, which exchange by themselves, with the reason."""
    from diffusers import ContextParallelConfig

    found = {}
    model, inputs = built("wan", 4, (4, 2, 4))
    want = tiny.run(model, inputs)
    handle = accelerate(model)
    enable(model, ring_degree=2)
    try:
        found["ring far"] = tiny.relative(tiny.run(model, inputs), want)
    except (RuntimeError, NotImplementedError, ValueError) as error:  # diffusers has no ring attention on a CPU
        found["ring error"] = str(error)
    found["ring"] = [dict(layer["fallbacks"]) for layer in handle.stats()["layers"]]
    model, inputs = tiny.wan()
    sequence_parallel(accelerate(model))
    found["both"] = refused(lambda: enable(model, ulysses_degree=2))
    model, _ = tiny.cogvideox()
    handle = accelerate(model, Config(on_unsupported="error"))
    enable_plan = ContextParallelConfig(ulysses_degree=2)
    model.enable_parallelism(config=enable_plan, cp_plan={})
    found["family"] = refused(lambda: tiny.run(model, tiny.cogvideox()[1]))
    return found


def run(cases: list[Case]) -> dict[str, Any]:
    return run_cases(cases, globals())
