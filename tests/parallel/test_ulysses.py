"""Several ranks give the clip of one process, whatever plans, remembers or stands around its attention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import ranks
import ulysses_cases
from planner_settings import PLANNERS
from ulysses_cases import Case, results

SHARED = (
    "allegro", "consisid", "cosmos_1", "cosmos_2", "easyanimate", "hunyuan_framepack", "hunyuan_token_replace",
    "hunyuan_video15", "ltx_video", "mochi", "skyreels_df", "wan_i2v",
)  # fmt: skip
TOLERANCE = 1e-6  # the same kernels on the same numbers; matrix products of fewer rows may round in another way

PLANNED: list[Case] = [
    (f"{name} {family}", "planner", (name, family)) for name in PLANNERS for family in ulysses_cases.FAMILIES
]
OTHERS: list[Case] = [
    *((f"{name} text first", "planner", (name, "cogvideox")) for name in ("adaspa", "draft", "svg2")),
    ("a timestep per token", "planner", ("draft", "wan_ti2v")),
    *((f"{name} per head", "planner", (name, "wan", knobs)) for name, knobs in ulysses_cases.PER_HEAD.items()),
    *((f"cache {kind}", "cached", (kind,)) for kind in ("taylorseer", "module", "model", "teacache", "first_block")),
    *((f"gradients {family}", "gradients", (family, False)) for family in ("wan", "hunyuan_video", "cogvideox")),
    ("gradients checkpointing", "gradients", ("wan", True)),
    ("back", "everything_back", ()),
    ("memory", "memory", ()),
    ("hooks", "hooks", ()),
    ("linear", "linear", ()),
    ("precision", "precision", ()),
    ("streaming", "streaming", ()),
    *((f"positions {family}", "positions", (family,)) for family in ("wan", "hunyuan_video", "cogvideox")),
    ("refusals", "refusals", ()),
    ("families", "families", (SHARED,)),
]
FOUR: list[Case] = [
    *((f"{name} wan", "planner", (name, "wan")) for name in PLANNERS),
    ("draft hunyuan_video", "planner", ("draft", "hunyuan_video")),
    ("adaspa fewer heads", "planner", ("adaspa", "wan", None, 3)),
    ("svg2 one head", "planner", ("svg2", "cogvideox", None, 1)),
    *((f"{name} per head", "planner", (name, "wan", knobs)) for name, knobs in ulysses_cases.PER_HEAD.items()),
    ("memory", "memory", ()),
    ("gradients hunyuan_video", "gradients", ("hunyuan_video", False)),
]


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return ranks.run(2, ulysses_cases.run, PLANNED + OTHERS, seconds=420)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return ranks.run(4, ulysses_cases.run, FOUR, seconds=420)


def check_plan(found: list[dict[str, Any]], name: str) -> None:
    for rank in results(found, name):
        assert rank["far"] <= TOLERANCE, rank
        assert rank["same reads"] and not rank["fallbacks"] and rank["calls"] == 8, rank
    assert any(rank["sparse"] for rank in results(found, name))


@pytest.mark.parametrize("name", [name for name, _, _ in PLANNED])
def test_two_ranks_plan_like_one_process(two: list[dict[str, Any]], name: str) -> None:
    """Five heads on two ranks, 315 rows, padded text behind them."""
    check_plan(two, name)


@pytest.mark.parametrize("name", ["adaspa", "draft", "svg2"])
def test_text_first(two: list[dict[str, Any]], name: str) -> None:
    check_plan(two, f"{name} text first")


def test_a_timestep_per_token(two: list[dict[str, Any]]) -> None:
    check_plan(two, "a timestep per token")


@pytest.mark.parametrize("name", [name for name, fn, _ in FOUR if fn == "planner"])
def test_four_ranks_plan_like_one_process(four: list[dict[str, Any]], name: str) -> None:
    """Also with fewer heads than ranks."""
    check_plan(four, name)


@pytest.mark.parametrize("name", ulysses_cases.PER_HEAD)
def test_tables_per_head_are_those_of_the_own_heads(two: list[dict[str, Any]], name: str) -> None:
    check_plan(two, f"{name} per head")


@pytest.mark.parametrize("world", ["two", "four"])
def test_memory_counts_once(request: pytest.FixtureRequest, world: str) -> None:
    for rank in results(request.getfixturevalue(world), "memory"):
        assert rank["far"] <= TOLERANCE and rank["changes"] > 1e-3, rank


def test_everything_comes_back(two: list[dict[str, Any]]) -> None:
    for place, rank in enumerate(results(two, "back")):
        assert rank["far"] <= TOLERANCE and rank["stock"] and rank["report"] and rank["quiet"], rank
        # q, k, v and the result of two layers of 5 heads of 16 channels, fp32, and the joined rows
        rows, heads = (158, 157)[place], (2, 3)
        out = 3 * rows * heads[1 - place] + (157, 158)[place] * heads[place]
        assert rank["bytes"] == 4 * (2 * out * 16 + rows * 80)


def test_hooks_see_whole_sequences(two: list[dict[str, Any]]) -> None:
    for rank in results(two, "hooks"):
        assert rank["far"] <= TOLERANCE and rank["seen"] == {(315, 9)}, rank
        assert "hooks at attention_output see all rows" in rank["message"]


def test_linear_layers(two: list[dict[str, Any]]) -> None:
    assert all(rank["far"] <= TOLERANCE for rank in results(two, "linear"))


@pytest.mark.parametrize("kind", ["taylorseer", "module", "model", "teacache", "first_block"])
def test_caches_leave_out_the_same_blocks_everywhere(two: list[dict[str, Any]], kind: str) -> None:
    for rank in results(two, f"cache {kind}"):
        assert rank["far"] <= 1e-5 and rank["same steps"] and rank["forecast"], rank


@pytest.mark.parametrize("name", [name for name, fn, _ in OTHERS if fn == "gradients"])
def test_gradients_add_up(two: list[dict[str, Any]], name: str) -> None:
    for rank in results(two, name):
        assert rank["far"] <= 2e-5 and rank["names"], rank


def test_gradients_add_up_over_four(four: list[dict[str, Any]]) -> None:
    for rank in results(four, "gradients hunyuan_video"):
        assert rank["far"] <= 2e-5 and rank["names"], rank


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox"])
def test_positions_are_those_of_all_rows(two: list[dict[str, Any]], family: str) -> None:
    for rank in results(two, f"positions {family}"):
        assert rank["far"] <= TOLERANCE and rank["whole"] and rank["changes"] > 1e-4, rank


def test_rollouts_keep_keys_of_the_own_heads(two: list[dict[str, Any]]) -> None:
    for rank in results(two, "streaming"):
        assert rank["far"] <= TOLERANCE and 'use "post_rope" over several ranks' in rank["message"], rank


def test_sixteen_bits(two: list[dict[str, Any]]) -> None:
    assert all(rank["far"] <= 2**-9 for rank in results(two, "precision"))


@pytest.mark.slow
def test_compiled_blocks() -> None:
    cases: list[Case] = [(family, "compiled", (family,)) for family in ("wan", "cogvideox")]
    found = ranks.run(2, ulysses_cases.run, cases, seconds=420)
    for family in ("wan", "cogvideox"):
        assert all(rank["far"] <= 1e-5 for rank in results(found, family))


def test_refusals(two: list[dict[str, Any]]) -> None:
    wanted = {
        "subset": "set subset to null",
        "twice": "shared already; end that first: call what sequence_parallel returned",
        "short": "a sequence of 1 rows cannot be shared by 2 ranks",
        "removed": "this handle was removed",
        "wan_vace": "vace_blocks.0.attn1 attends to all rows",
        "ltx2": "the audio reads the video tokens",
        "latte": "not known to work token by token",
        "wan_animate": "which needs whole frames",
        "masked": "video tokens are masked",
    }
    for rank in results(two, "refusals"):
        for name, message in wanted.items():
            if name in ("ltx2", "wan_animate") and name not in rank:  # not in the oldest diffusers
                continue
            assert re.search(message, rank[name]), (name, rank[name])


@pytest.mark.parametrize("family", SHARED)
def test_families(two: list[dict[str, Any]], family: str) -> None:
    found = results(two, "families")
    if family not in found[0]:
        pytest.skip("this diffusers has no such model")
    assert all(rank[family] <= TOLERANCE for rank in found)


def test_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    from vdit_fast.accelerate import accelerate
    from vdit_fast.parallel import guidance_parallel, sequence_parallel

    handle = accelerate(tiny.wan()[0])
    for fn in (sequence_parallel, guidance_parallel):
        with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
            fn(handle)
