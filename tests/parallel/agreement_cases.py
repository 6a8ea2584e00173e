"""What the ranks of ``test_agreement.py`` run: every rank is given something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import planner_settings
import tiny
import torch
import torch.distributed as dist
from context_cases import enable
from torch import Tensor
from ulysses_cases import Case, built, far, refused
from ulysses_cases import run as run_cases

from vdit_fast.accelerate import accelerate
from vdit_fast.parallel import guidance_parallel, sequence_parallel
from vdit_fast.parallel.agreement import Agreement


def failed(fn: Callable[[], Any]) -> str:
    return refused(fn, ValueError)


def other(inputs: dict[str, Any], what: str) -> dict[str, Any]:
    """On rank 1 inputs of another size, elsewhere the given ones."""
    if dist.get_rank() != 1:
        return inputs
    x, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    changes = {
        "frames": {"hidden_states": x[:, :, :-1]},
        "batch": {"hidden_states": x.repeat(2, 1, 1, 1, 1), "encoder_hidden_states": text.repeat(2, 1, 1)},
        "text": {"encoder_hidden_states": text[:, :-3]},
        "height": {"hidden_states": x[:, :, :, :-2]},
    }
    return {**inputs, **changes[what]}


def sequence(what: str, later: bool) -> dict[str, Any]:
    """``later``: in the middle of a generation that began well. What follows with equal inputs is as it should be."""
    model, inputs = built("wan", heads=4, grid=(4, 4, 6))
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    with sequence_parallel(handle, patience=20.0):
        handle.reset()
        if later:
            tiny.run(model, tiny.at(inputs, 900.0))
        message = failed(lambda: tiny.run(model, tiny.at(other(inputs, what), 800.0)))
        got = tiny.run(model, inputs)
    return {"message": message, "far": far([got], [want])}


def guidance(split: str, what: str) -> dict[str, Any]:
    model, inputs = planner_settings.build("wan")
    handle = accelerate(model)
    given = other(inputs, what)
    if split == "batch":
        inputs, given = (
            {name: torch.cat([value] * 2) if isinstance(value, Tensor) else value for name, value in each.items()}
            for each in (inputs, given)
        )
    want = tiny.run(model, inputs)
    calls = 1 if split == "batch" else 2
    with guidance_parallel(handle, split=split, patience=20.0):
        handle.reset()
        for _ in range(calls):
            tiny.run(model, tiny.at(inputs, 900.0))
        message = failed(lambda: tiny.run(model, tiny.at(given, 800.0)))
        handle.reset()
        got = [tiny.run(model, inputs) for _ in range(calls)]
    return {"message": message, "far": far([got[-1]], [want])}


def context(what: str) -> dict[str, Any]:
    """Under diffusers' plan."""
    model, inputs = built("wan", heads=4, grid=(4, 4, 6))
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    enable(model, ulysses_degree=2)
    handle.reset()
    message = failed(lambda: tiny.run(model, other(inputs, what)))
    got = tiny.run(model, inputs)
    return {"message": message, "far": far([got], [want])}


def exchanges() -> dict[str, Any]:
    """How often something is sent, with and without tensors of the CPU."""
    found = {}
    for name in ("host", "device"):
        runs = []

        def run(collective: Callable[[bool], Any], runs: list[int] = runs) -> None:
            runs.append(1)
            collective(False)

        agree = Agreement(dist.group.WORLD, "here", run)
        agree._host = name == "host"
        for generation in (0, 0, 1, None, None):
            agree("the same", torch.device("cpu"), generation)
        found[name] = len(runs)
        long = "x" * 400 + str(dist.get_rank())  # of which a part is sent
        found[f"{name} message"] = failed(lambda agree=agree, long=long: agree(long, torch.device("cpu"), 7))  # type: ignore[misc]
    return found


def run(cases: list[Case]) -> dict[str, Any]:
    return run_cases(cases, globals())
