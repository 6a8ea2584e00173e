"""DiTraj: training-free trajectory control for video diffusion transformers (arXiv 2509.21839): row 4.

In the first 5 of 50 steps the tokens of an object's box take the spatial positions of one anchor box, and neither read
the redundant tokens, which have these positions of themselves, nor are read by them. In the first 30, the object's
tokens read the foreground prompt and all others the background prompt; the unconditional branch reads its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import vdit_fast
from vdit_fast.accelerate import accelerate
from vdit_fast.positions import anchored_rows, grid_ids, take_rows
from vdit_fast.regions import Regions, region_labels, region_plan

GRID = (3, 5, 7)  # odd sizes
BOXES = [(0, 0, 3, 4), (1, 2, 4, 6), (2, 3, 5, 7)]
STEPS = 50
TIMESTEPS = torch.linspace(1000, 20, STEPS)


def build() -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny.wan()
    inputs = tiny.regrid(inputs, GRID)
    return model, {**inputs, "encoder_hidden_states": torch.randn(1, 9, 16)}


def plugged(model: Any) -> Any:
    return accelerate(SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=TIMESTEPS)))


def at(inputs: dict[str, Any], step: int) -> dict[str, Any]:
    return {**inputs, "timestep": TIMESTEPS[step : step + 1]}


def pairs_that_must_not_meet() -> Tensor:
    """bool [N, N] from the ids themselves: box tokens against tokens outside that share their id with any other."""
    ids = grid_ids(GRID)[anchored_rows(GRID, BOXES)]
    same = (ids[:, None] == ids[None]).all(-1).fill_diagonal_(False)
    frame, row, column = grid_ids(GRID).unbind(1)
    top, left, bottom, right = torch.tensor(BOXES)[frame].unbind(1)
    box = (top <= row) & (row < bottom) & (left <= column) & (column < right)
    redundant = same.any(1) & ~box
    assert redundant.any()
    return (box[:, None] & redundant) | (redundant[:, None] & box)


def test_class_mask_is_the_boolean_mask() -> None:
    plan = region_plan(region_labels(GRID, BOXES))
    allowed = ~pairs_that_must_not_meet()
    assert plan is not None and torch.equal(plan.to_mask()[0, 0], allowed)
    q, k, v = torch.randn(3, 2, allowed.shape[0], 3, 16).unbind()
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).masked_fill(~allowed, -torch.inf)
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(vdit_fast.attention(q, k, v, plan), want, atol=2e-6, rtol=1e-5)


def masked(model: Any, inputs: dict[str, Any], masks: dict[int, Tensor], rows: Tensor | None) -> Tensor:
    """The stock model with boolean masks by number of keys, and the ids of other tokens."""
    real = torch.nn.functional.scaled_dot_product_attention

    def call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        return real(query, key, value, attn_mask=masks.get(key.shape[2], attn_mask), **options)

    hook = model.rope.register_forward_hook(lambda _, args, out: out if rows is None else take_rows(out, rows))
    torch.nn.functional.scaled_dot_product_attention = call
    try:
        return tiny.run(model, inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
        hook.remove()


def test_step_ranges_in_a_real_model() -> None:
    """Ids and self-attention mask in steps 0-4 of both branches, two prompts in steps 0-29 of the conditional one."""
    model, inputs = build()
    blank = {"encoder_hidden_states": torch.randn(1, 9, 16)}
    background, foreground = torch.randn(2, 1, 9, 16).unbind()
    rows, n = anchored_rows(GRID, BOXES), GRID[0] * GRID[1] * GRID[2]
    frame, row, column = grid_ids(GRID).unbind(1)
    top, left, bottom, right = torch.tensor(BOXES)[frame].unbind(1)
    box = (top <= row) & (row < bottom) & (left <= column) & (column < right)
    to_self, to_text = {n: ~pairs_that_must_not_meet()}, {18: box[:, None] == (torch.arange(18) >= 9)}
    both = {"encoder_hidden_states": torch.cat((background, foreground), dim=1)}

    want, steps = {}, (0, 4, 5, 6, 29, 30, 49)
    for step in steps:
        early = step < 5
        masks, ids = (to_self, rows) if early else ({}, None)
        call = at(inputs, step)
        given = {**call, **both} if step < 30 else call
        want[step] = [
            masked(model, given, masks | (to_text if step < 30 else {}), ids),
            masked(model, {**call, **blank}, masks, ids),
        ]
    handle = plugged(model).regions(Regions(BOXES, foreground, background))
    for step in steps:
        for branch in range(2):
            got = tiny.run(model, at(inputs if branch == 0 else {**inputs, **blank}, step))
            assert tiny.relative(got, want[step][branch]) < 3e-6, (step, branch)
    assert handle.stats()["regions"] == {"masked": {0: 2, 4: 2}, "prompted": {s: 1 for s in steps if s < 30}}
    handle.remove()


@pytest.mark.parametrize("box", [(0, 0, 5, 7), (1, 2, 4, 5)])
def test_boxes_that_stand_still_change_nothing(box: tuple[int, int, int, int]) -> None:
    """The whole frame, or a part of it, the same in all frames: the ids are the model's own, nothing is redundant, and
    step 0 is dense attention bit for bit."""
    assert torch.equal(anchored_rows(GRID, [box] * 3), torch.arange(105))
    model, inputs = build()
    handle = plugged(model)
    dense = tiny.run(model, at(inputs, 0))
    handle.regions(Regions([box] * 3)).reset()
    assert torch.equal(tiny.run(model, at(inputs, 0)), dense)
    assert handle.stats()["regions"] == {"masked": {}, "prompted": {}}


def test_step_6_uses_the_models_own_ids() -> None:
    model, inputs = build()
    handle = plugged(model)
    own = [tiny.run(model, at(inputs, step)) for step in range(8)]
    handle.regions(Regions(BOXES)).reset()
    same = [torch.equal(tiny.run(model, at(inputs, step)), own[step]) for step in range(8)]
    assert same == [False] * 5 + [True] * 3
