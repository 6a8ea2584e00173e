"""What the tests of all planners set for each: add one line here when a planner joins the registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from families.easyanimate import easyanimate
from families.mochi import mochi
from torch import nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.handle import Handle
from vdit_fast.planners import REGISTRY


@dataclass(frozen=True)
class Setting:
    """How one planner is run on grids of a few hundred tokens.

    Attributes:
        knobs: what makes it sparse there, on top of one dense step and no dense layer.
        loose: what makes it read everything, so that the answer must be the dense one; None: no knob does that.
        alone: batch items are planned independently of each other, so that batched and split guidance agree.
    """

    knobs: dict[str, Any] = field(default_factory=dict)
    loose: dict[str, Any] | None = None
    alone: bool = True


SETTINGS: dict[str, Setting] = {
    "adaspa": Setting(
        {"sparsity": 0.6, "block": 16, "search": [1, 3]}, loose={"sparsity": 0.0, "head_adaptive": False}
    ),
    "draft": Setting({"sparsity": 0.6, "pool": [3, 4]}, loose={"sparsity": 0.0}),
    "radial": Setting({"block": 16, "sinks": 0}, loose={"decay": 64.0, "thinning": False}),
    "rettention": Setting({"window": 0.25, "interval": 3}, loose={"window": 1.0, "increment": 0.0}),
    "shifted_window": Setting({"window": [2, 4, 4]}, loose={"window": [0, 0, 0]}),
    "sliding_tile": Setting({"sparsity": 0.6, "tile": [2, 3, 3]}, loose={"sparsity": 0.0}),
    "sparge": Setting({"sparsity": 0.6, "block": [32, 16]}, loose={"sparsity": 0.0}),
    "sparse_vdit": Setting({"modes": "dm", "block": 16, "sparsity": 0.6}, loose={"modes": "full"}),
    "svg1": Setting({"sparsity": 0.7, "block": 16, "sinks": 0}, loose={"sparsity": 0.0}),
    "svg2": Setting({"top_p": 0.6, "q_clusters": 12, "k_clusters": 24, "min_keep_ratio": 0.0}, loose={"top_p": 1.0}),
    "vsa": Setting({"sparsity": 0.6, "cube": [2, 3, 3]}, loose={"sparsity": 0.0}),
    "window": Setting({"sparsity": 0.6, "tile": [2, 3, 3]}, loose={"sparsity": 0.0}),
    "xattention": Setting({"top_p": 0.5, "block": 16, "stride": 4}, loose={"top_p": 1.0}),
}

PLANNERS = sorted(name for name, cls in REGISTRY.items() if cls.__module__.startswith("vdit_fast."))
FAMILIES = {
    "wan": tiny.wan,  # video only
    "wan_ti2v": lambda: tiny.wan(per_token=True),
    "hunyuan_video": lambda: tiny.hunyuan(lengths=(5, 9)),  # text last, padded
    "cogvideox": tiny.cogvideox,  # text first
}
MORE_FAMILIES = {  # other ways of making the same layouts: one test of each planner
    "easyanimate": lambda: easyanimate(layers=1, mmdit_layers=1),  # text first, with projections of its own
    "mochi": lambda: mochi(layers=1, lengths=(4, 9)),  # text last, gathered
}
GRID = (5, 7, 9)
TIMES = (900.0, 700.0, 500.0, 300.0)  # one dense step, three sparse ones


def setting(planner: str) -> Setting:
    if planner not in SETTINGS:
        pytest.fail(
            f"planner {planner!r} has no test settings: add a line for it to tests/accelerate/planner_settings.py"
        )
    return SETTINGS[planner]


def config(planner: str, **knobs: Any) -> Config:
    given = {"dense_steps": 1} | setting(planner).knobs | knobs
    return Config.from_dict({"attention": {"method": planner, **given}, "on_unsupported": "error"})


def build(family: str, grid: tuple[int, int, int] = GRID) -> tiny.Built:
    model, inputs = (FAMILIES | MORE_FAMILIES)[family]()
    return model, tiny.regrid(inputs, grid)


def plugged(model: nn.Module, settings: Config) -> Handle:
    """Accelerated with a schedule of known length, as in a pipeline."""
    return accelerate(
        SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=torch.tensor(TIMES))), settings
    )
