"""VDMini: Individual Content and Motion Dynamics Preserved Pruning for Video Diffusion Models (arXiv 2411.18375).

The student is the teacher without some of its blocks. Nothing may assume how many blocks a model has, or their places.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from vdit_fast.accelerate import accelerate
from vdit_fast.config import Config
from vdit_fast.planners import SparseVDiT

pytest.importorskip("diffusers")

DEPTH = {"wan_t2v": {"layers": 6}, "cogvideox_5b": {"layers": 6}, "hunyuan_video": {"layers": 3, "single": 3}}


def stacks(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_children() if name.endswith("blocks") and len(child)]


def prune(model: nn.Module, share: float = 1 / 3) -> nn.Module:
    """Drop a share of each stack's blocks, drawn at random; what the configuration says about depth becomes wrong."""
    for name in stacks(model):
        blocks = getattr(model, name)
        kept = sorted(random.Random(7).sample(range(len(blocks)), len(blocks) - round(share * len(blocks))))
        setattr(model, name, nn.ModuleList(blocks[i] for i in kept))
    return model


def student(family: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny.build(family, **DEPTH[family])
    return prune(model), inputs


@pytest.mark.parametrize("family", DEPTH)
def test_pruned_model_is_served_and_answers_the_same(family):
    model, inputs = student(family)
    stock = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    handle = accelerate(model)
    tiny.exact_enough(tiny.run(model, inputs), stock, truth)
    names = {layer["name"] for layer in handle.stats()["layers"]}
    left = {f"{stack}.{i}" for stack in stacks(model) for i in range(len(getattr(model, stack)))}
    assert len(left) == 4 and {name.rpartition(".")[0] for name in names} == left
    assert all(layer["calls"] == 1 and not layer["fallbacks"] for layer in handle.stats()["layers"])
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)


@pytest.mark.parametrize("family", DEPTH)
def test_pruning_an_accelerated_model(family):
    model, inputs = tiny.build(family, **DEPTH[family])
    stock = tiny.run(prune(copy.deepcopy(model)), inputs)
    handle = accelerate(model)
    got = tiny.run(prune(model), inputs)
    assert tiny.relative(got, stock) < 2e-6 and len(tiny.served(model)) == 4
    handle.remove()
    assert not tiny.served(model) and torch.equal(tiny.run(model, inputs), stock)


@pytest.mark.parametrize("family", DEPTH)
def test_layers_are_counted_in_the_model_that_is_there(family):
    """ "The first and the last layer" are those that were not pruned."""
    model, inputs = student(family)
    handle = accelerate(model, Config(attention=tiny.Band(dense_layers=(0, -1))))
    tiny.run(model, inputs)
    assert [layer["sparse_calls"] for layer in handle.stats()["layers"]] == [0, 1, 1, 0]


@pytest.mark.parametrize("family", DEPTH)
def test_plans_per_layer_refuse_another_depth(family):
    """A table of the teacher's six layers would put four of its rows on the wrong layers of the student."""
    row = "fd"  # head 0 full, head 1 diagonal
    teacher, pupil = [row] * 6, [row] * 4
    model, inputs = student(family)
    handle = accelerate(model, Config(attention=SparseVDiT(modes=teacher, block=8)))
    with pytest.raises(ValueError, match="table has 6 layers, the model has 4"):
        tiny.run(model, inputs)
    handle.reconfigure(Config(attention=SparseVDiT(modes=pupil, block=8)))
    tiny.run(model, inputs)
    assert [layer["sparse_calls"] for layer in handle.stats()["layers"]] == [1] * 4


@pytest.mark.parametrize("family", ["svd", "animatediff"])
def test_pruned_unets(family):
    """As in the paper: without the second pair of residual and attention block of each level, and other layers gone."""
    teacher, inputs = tiny.build(family, layers=2)
    model, _ = tiny.build(family, layers=1)
    first = next((m for m in model.modules() if hasattr(m, "temporal_transformer_blocks")), None)
    if first is not None:
        first.transformer_blocks = first.temporal_transformer_blocks = nn.ModuleList()
    stock = tiny.run(model, inputs)
    truth = tiny.run(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64))
    with accelerate(teacher) as whole:
        layers = len(whole.stats()["layers"])
    handle = accelerate(model)
    tiny.exact_enough(tiny.run(model, inputs), stock, truth)
    left = handle.stats()["layers"]
    assert 0 < len(left) < layers and all(layer["calls"] == 1 and not layer["fallbacks"] for layer in left)
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), stock)
