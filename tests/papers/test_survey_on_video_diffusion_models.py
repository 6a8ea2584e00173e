"""A Survey on Video Diffusion Models (arXiv 2310.10647).

Generation, editing and understanding: the pipelines of every axis exist, and what nobody here knows is left alone. A
model of an unknown class is untouched, and that is said so that a program can read it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from coverage_page import classes, table
from torch import Tensor, nn

import vdit_fast
from vdit_fast.accelerate import accelerate

diffusers = pytest.importorskip("diffusers")


class Understanding(nn.Module):
    """A network for understanding, of an unknown class: clip features in, labels out; attention by torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 3)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + hidden_states).mean(1)


class UnknownProcessor:
    """Somebody's processor in a model of a known class."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def anatomy(model: nn.Module) -> list[Any]:
    """Everything that a library could have changed, by identity."""
    found = []
    for name, module in model.named_modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
        processor = id(getattr(module, "processor", None))
        found.append((name, id(module), type(module), processor, list(vars(module)), [list(x) for x in hooks]))
    return found


def test_every_task_names_pipelines_that_exist():
    rows = table("By task")
    text = " ".join(row[0] for row in rows)
    assert all(axis in text for axis in ("generation", "editing", "understanding"))
    for row in rows:
        names = classes(row[2])
        assert names, row
        for name in names:
            assert hasattr(diffusers, name), f"docs/coverage.md names {name}, which diffusers does not have"


def test_an_unknown_class_is_untouched_and_named():
    model = Understanding().eval()
    clip, t = torch.randn(2, 7, 16), torch.tensor(3.0)
    before, answer = anatomy(model), model(clip, t)
    with pytest.raises(vdit_fast.NothingServed, match="Understanding") as caught:
        accelerate(model)
    assert caught.value.components == {"": "Understanding"} and caught.value.skipped == ()
    assert anatomy(model) == before and torch.equal(model(clip, t), answer)


def test_unknown_parts_of_a_pipeline_are_untouched():
    """Next to a known model; the unknown class has no processor, the unknown processor is listed with its reason."""
    known, inputs = tiny.wan()
    known.blocks[1].attn1.set_processor(UnknownProcessor())
    pipe = SimpleNamespace(transformer=known, judge=Understanding().eval())
    clip, t = torch.randn(2, 7, 16), torch.tensor(3.0)
    before, whole, stock = anatomy(pipe.judge), anatomy(known), tiny.run(known, inputs)
    answer = pipe.judge(clip, t)
    handle = accelerate(pipe)
    assert anatomy(pipe.judge) == before and torch.equal(pipe.judge(clip, t), answer)
    assert [layer["name"] for layer in handle.stats()["layers"]] == ["blocks.0.attn1"]
    reasons = handle.stats()["skipped"]
    assert reasons["processor UnknownProcessor is not of a known family"] == ["transformer.blocks.1.attn1"]
    assert "UnknownProcessor" in handle.report()
    assert tiny.relative(tiny.run(known, inputs), stock) < 2e-6
    handle.remove()
    assert anatomy(known) == whole


def test_features_for_understanding_come_out_the_same():
    """Hooks on inner layers, set before and after accelerate(), see what they saw."""
    model, inputs = tiny.wan()
    stock = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {"stock": [], "before": [], "after": []}

    def keep(name: str) -> Any:
        return lambda module, args, out: seen[name].append(out)

    stock.blocks[1].register_forward_hook(keep("stock"))
    model.blocks[1].register_forward_hook(keep("before"))
    accelerate(model)
    model.blocks[1].register_forward_hook(keep("after"))
    for network in (stock, model):
        network(**inputs)
    (want,), (first,), (second,) = seen["stock"], seen["before"], seen["after"]
    assert first is second and tiny.relative(first, want) < 2e-6
