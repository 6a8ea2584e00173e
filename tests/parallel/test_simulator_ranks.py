"""The simulator beside real ranks whose work is mostly waiting, so that other programs of the machine hardly matter."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ranks
import torch

from vdit_fast.accelerate import accelerate
from vdit_fast.demo.model import load_demo_model
from vdit_fast.parallel import StagePipeline, split_layers
from vdit_fast.parallel.demo import x0_sampler
from vdit_fast.parallel.simulator import Pipeline, simulate

STEPS, BLOCKS, PAUSE = 4, 3, 0.1


def draw() -> tuple[dict[str, Any], list[Any], float]:
    """Facts, events and the beginning of a run in which every layer takes PAUSE seconds more."""
    model: Any = load_demo_model()
    pipeline = StagePipeline(accelerate(model, "exact"))
    run = pipeline.stage.run

    def slowly(*args: Any) -> Any:
        time.sleep(PAUSE * len(pipeline.layers[pipeline.rank]))
        return run(*args)

    pipeline.stage.run = slowly  # type: ignore[method-assign]
    text = torch.zeros(1, 1, model.config.text_dim)
    made = pipeline.generate(
        x0_sampler(STEPS),
        (3, 16, 16),
        {"encoder_hidden_states": text},
        blocks=BLOCKS,
        num_per_block=2,
        num_cat=1,
        seed=0,
    )
    assert len(list(made)) == (BLOCKS if pipeline.rank == 0 else 0)
    return pipeline.facts(), pipeline.trace.events, pipeline.trace.began


@pytest.mark.parametrize("world", [2, 4])
def test_a_run_is_what_its_trace_predicts(world: int) -> None:
    """The order, what waits for what and what is sent are the simulator's: fed with the seconds of every forward on
    every rank it gives the whole; with nothing but the pauses, a little less."""
    found = ranks.run(world, draw)
    work = [[end - begin for kind, *_, begin, end in events if kind == "compute"] for _, events, _ in found]
    facts, events, _ = found[0]
    took = max(event[4] for event in events) - min(event[3] for event in events if event[0] == "compute")
    p = Pipeline(
        STEPS, BLOCKS, [len(own) * PAUSE for own in split_layers(6, world)], hop_bytes=facts["hop_bytes"],
        first_return_bytes=facts["result_bytes"][0], return_bytes=facts["result_bytes"][1],
    )  # fmt: skip
    pauses, run = simulate(p), simulate(p, list(zip(*work, strict=True)))
    assert pauses.latency <= run.latency <= took * 1.005
    assert run.latency >= 0.85 * took, f"predicted {run.latency:.2f} s, took {took:.2f} s"
    sent = [facts["sent"] for facts, *_ in found]
    assert [run.messages, run.bytes] == [sum(s[0] for s in sent), sum(s[1] for s in sent)]
