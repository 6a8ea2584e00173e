"""Every planner, with all its selection operators and the attention itself done by the emulated CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import emulator_block_mass
import emulator_clusters
import emulator_select
import pytest
import torch

import vdit_fast
from emulator import LAZY_FORWARD, LAZY_REVERSE, RANDOMS, Policy, attention
from vdit_fast import ops, reference
from vdit_fast.planners import REGISTRY, from_dict

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("accelerate", "support")]
from planner_calls import layer  # the path is set above
from planner_settings import SETTINGS

GRID, STEPS = (4, 7, 6), 4
LAYOUTS = [(0, False), (9, False), (9, True)]
USED: set[str] = set()
NAMES = sorted(name for name in REGISTRY if REGISTRY[name].__module__.startswith("vdit_fast."))


@pytest.fixture(params=[LAZY_FORWARD, LAZY_REVERSE, RANDOMS[0], RANDOMS[1]], ids=lambda p: p.name)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Puts the emulated kernels in place of the compiled operators; returns their schedule."""
    policy: Policy = request.param
    select = emulator_select.select
    twins = {
        "select_top_k": lambda scores, k: select(scores, k, policy=policy),
        "select_top_p": lambda mass, p, min_keep=1: select(mass, min_keep, p, policy),
        "block_mean": lambda *a, **k: emulator_clusters.block_mean(*a, **k, policy=policy),
        "counting_sort": lambda *a: emulator_clusters.counting_sort(*a, policy=policy),
        "kmeans_assign": lambda *a: emulator_clusters.kmeans_assign(*a, policy=policy),
        "score_lse": lambda *a, **k: emulator_block_mass.score_lse(*a, **k, policy=policy),
        "block_mass": lambda *a, **k: emulator_block_mass.block_mass(*a, **k, policy=policy),
        "softmax_mass": lambda *a, **k: emulator_block_mass.softmax_mass(*a, **k, policy=policy),
    }

    def noted(name: str, twin):
        def call(*arguments, **options):
            USED.add(name)
            return twin(*arguments, **options)

        return call

    modules = [m for n, m in sys.modules.items() if n.startswith(("vdit_fast.ops", "vdit_fast.planners"))]
    for name, twin in twins.items():
        original = getattr(ops, name)
        for module in modules:
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, noted(name, twin))
    compiled = lambda keep, q_len, kv_len, lq, q_tile: emulator_select.compile_blocks(  # noqa: E731
        keep, q_len, kv_len, lq, q_tile, policy
    )
    monkeypatch.setattr(vdit_fast.plan.runs, "compiled", noted("compile_blocks", compiled))
    return policy


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_on_the_device_path(name: str, emulated: Policy) -> None:
    text, text_first = LAYOUTS[NAMES.index(name) % len(LAYOUTS)]
    planner = from_dict({"method": name, "dense_steps": 1, **SETTINGS[name].knobs})
    torch.manual_seed(1)
    state: dict = {}
    sparse = 0
    for step in range(STEPS):
        ctx = layer(GRID, text, text_first, step=step, num_steps=10, state=state)
        q, k, v = (torch.randn(1, ctx.num_tokens, 2, 16).bfloat16() for _ in range(3))
        found = planner.decision(q, k, v, ctx)
        if found.plan is None and found.observe is None:
            continue  # dense attention has tests of its own
        out, lse = attention(q, k, v, found.plan, row_scale=found.row_scale, policy=emulated)
        exact, exact_lse = reference.attention(
            q.double(), k.double(), v.double(), found.plan, row_scale=found.row_scale, return_lse=True
        )
        plain = reference.attention(q, k, v, found.plan, row_scale=found.row_scale)
        error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (out, plain))
        assert error <= 2 * allowed, f"step {step}: error {error:.2g}, torch's own path has {allowed:.2g}"
        torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=0, atol=2e-3)
        if found.observe is not None:
            found.observe(out, lse)
        if found.plan is not None:
            found.plan.validate()
            sparse += found.plan.density < 0.95
    assert sparse, f"{name} never ran sparse in {STEPS} steps"


def test_every_selection_kernel_had_work() -> None:
    if not USED:
        pytest.skip("runs after the tests above")
    wanted = {"select_top_k", "select_top_p", "block_mean", "block_mass", "softmax_mass", "compile_blocks"}
    wanted |= {"kmeans_assign", "counting_sort"}
    assert wanted <= USED, f"no planner called {sorted(wanted - USED)}"
