"""What the ranks of ``test_guidance.py`` run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import planner_settings
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from ulysses_cases import Case, far, refused
from ulysses_cases import run as run_cases

from vdit_fast.accelerate import accelerate
from vdit_fast.caching import TaylorSeer, TeaCache
from vdit_fast.config import Config
from vdit_fast.parallel import guidance_parallel, sequence_parallel
from vdit_fast.subset import RAS

TIMES = planner_settings.TIMES


def between_nothing(x: Tensor, out: Tensor) -> Tensor:
    return out


def between_operators(x: Tensor, out: Tensor) -> Tensor:
    """What some pipelines do with the first branch before they call the second."""
    wide = (0.5 * x + out.double() * 2).to(out.dtype)
    return torch.cat([wide[:, :1], wide[:, 1:]], dim=1).clone()


def generate(model: nn.Module, inputs: dict[str, Any], between: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """A guided generation, one call per branch."""
    x, out = inputs["hidden_states"], []
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * 0.5}
    for t in TIMES:
        first = between(x, tiny.run(model, tiny.at({**inputs, "hidden_states": x}, t)))
        second = between(x, tiny.run(model, tiny.at({**other, "hidden_states": x}, t)))
        x = x - 0.1 * (second + 3 * (first - second))
        out.append(x)
    return out


def calls(planner: str, family: str, operators: bool = False, cache: bool = False) -> dict[str, Any]:
    """Split by calls; with four ranks two share every branch's rows."""
    model, inputs = planner_settings.build(family)
    between = between_operators if operators else between_nothing
    config = planner_settings.config(planner)
    if cache:
        config = Config(attention=config.attention, cache=TaylorSeer(first_full=2, interval=2, last_full=0))
    handle = planner_settings.plugged(model, config)
    want = generate(model, inputs, between)
    group, rows = None, None
    if dist.get_world_size() > 2:
        shape = (2, dist.get_world_size() // 2)
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("guidance", "sequence"))
        rows, group = sequence_parallel(handle, mesh["sequence"]), mesh["guidance"]
    before = handle.roots[0].session.layers[0].calls
    with guidance_parallel(handle, group) as guidance:
        handle.reset()
        got = generate(model, inputs, between)
        ran = handle.roots[0].session.layers[0].calls - before
        handle.reset()
        second = generate(model, inputs, between)
        again = handle.roots[0].session.layers[0].calls - before - ran
        report, sent = handle.report(), guidance.bytes_sent
    if rows is not None:
        rows()
    handle.reset()
    numbers = want[0].numel() * 4
    return {
        "far": far(got + second, want * 2),
        "ended": far(generate(model, inputs, between), want),
        "ran": (ran, again),
        "plain": all(type(x) is Tensor for x in got),
        "bytes": sent == 8 * numbers,
        "report": "guidance parallelism: rank" in report,
    }


def batch(items: int) -> dict[str, Any]:
    """Split by batch items."""
    model, inputs = planner_settings.build("hunyuan_video")
    inputs = {
        name: torch.cat([value, value.flip(0)])[:items] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    handle = planner_settings.plugged(model, planner_settings.config("draft"))
    want = [tiny.run(model, tiny.at(inputs, t)) for t in TIMES]
    with guidance_parallel(handle, split="batch"):
        handle.reset()
        got = [tiny.run(model, tiny.at(inputs, t)) for t in TIMES]
        one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        message = refused(lambda: tiny.run(model, tiny.at(one, TIMES[0])))
    return {"far": far(got, want), "message": message}


def misuse() -> dict[str, str]:
    """Pipelines that are not made of one call per branch."""
    found = {}
    model, inputs = tiny.wan()
    handle = accelerate(model)
    one, other = (tiny.at(inputs, t) for t in (900.0, 800.0))
    end = guidance_parallel(handle)
    for step in (tiny.at(inputs, 950.0), one):  # the first step learns the form of the answer
        first = tiny.run(model, step)
        tiny.run(model, step)
    assert first.isfinite().all()
    first = tiny.run(model, other)
    # rank 1 sees it when it looks at the answer, rank 0 with the next step
    found["unguided"] = refused(lambda: (first + 1).sum().item()) or refused(
        lambda: tiny.run(model, tiny.at(inputs, 700.0))
    )
    end()
    end = guidance_parallel(handle)
    handle.reset()
    for _ in range(2):
        tiny.run(model, one)
    found["three"] = refused(lambda: tiny.run(model, one))
    found["gradients"] = refused(lambda: model(**one))
    found["twice"] = refused(lambda: guidance_parallel(handle))
    end()
    for name, config in (("subset", Config(subset=RAS())), ("adaptive", Config(cache=TeaCache()))):
        handle.reconfigure(config)
        found[name] = refused(lambda: guidance_parallel(handle))
    handle.reconfigure("exact")
    guidance_parallel(handle)
    handle.remove()
    assert "forward" not in model.__dict__
    pipe = SimpleNamespace(transformer=model)
    try:
        guidance_parallel(accelerate(pipe), split="halves")
    except ValueError as error:
        found["split"] = str(error)
    return found


def demo(steps: int) -> dict[str, Any]:
    """The demo's pipeline, unchanged."""
    from vdit_fast.demo.model import load_demo_model
    from vdit_fast.demo.sampler import DemoPipeline

    pipe = DemoPipeline(load_demo_model())
    with accelerate(pipe) as handle:
        want = pipe("red circle right", steps=steps, frames=3, height=20, width=16).clip
        with guidance_parallel(handle):
            got = pipe("red circle right", steps=steps, frames=3, height=20, width=16).clip
    return {"far": far([got], [want])}


def run(cases: list[Case]) -> dict[str, Any]:
    return run_cases(cases, globals())
