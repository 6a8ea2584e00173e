"""4Diffusion: Multi-view Video Diffusion Model for 4D Generation (arXiv 2405.20674).

Self-attention over the tokens of all views of a frame, and the model inside a score distillation loss: gradients with
respect to what was rendered, through frozen weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from paper_checks import Operators, as_exact_as_torch, distance
from torch import Tensor

import vdit_fast
from vdit_fast.accelerate import accelerate

pytest.importorskip("diffusers")

VIEWS, PLACES = 4, 61
FAMILIES = ["animatediff", "wan_t2v", "cogvideox_5b", "hunyuan_video"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_all_views(dtype):
    """Views are the batch of the image model's tokens and one sequence here; the view [frames, V·hw] makes no copy."""
    q, k, v = torch.randn(3, 2, VIEWS, PLACES, 5, 64).to(dtype).flatten(2, 3).unbind()
    got = vdit_fast.attention(q, k, v)
    as_exact_as_torch(got, q, k, v)
    apart = vdit_fast.attention(*(x.unflatten(1, (VIEWS, PLACES)).flatten(0, 1) for x in (q, k, v)))
    assert distance(apart.unflatten(0, (2, VIEWS)).flatten(1, 2), got) > 0.1  # views do see each other


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradcheck_on_eight_tokens():
    """The kernel is fp32: finite differences of fp32 values, with a step to match."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 8, 2, 4).unbind())
    assert torch.autograd.gradcheck(vdit_fast.attention, (q, k, v), eps=1e-2, atol=2e-3, rtol=1e-2)


def latents(inputs: dict[str, Any]) -> str:
    """The argument's name: UNets and transformers differ."""
    return "sample" if "sample" in inputs else "hidden_states"


def distilled(model: Any, inputs: dict[str, Any], rendered: Tensor) -> Tensor:
    """Gradient of a loss on the model's answer with respect to what was rendered."""
    rendered = rendered.detach().requires_grad_()
    answer = model(**{**inputs, latents(inputs): rendered})[0]
    (grad,) = torch.autograd.grad((answer - 0.3).square().mean(), rendered)
    return grad


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_frozen_weights(family):
    model, inputs = tiny.build(family)
    rendered = torch.randn_like(inputs[latents(inputs)])
    stock = distilled(model, inputs, rendered)
    truth = distilled(copy.deepcopy(model).double(), tiny.cast(inputs, torch.float64), rendered.double())
    handle = accelerate(model)
    with Operators() as operators:
        got = distilled(model, inputs, rendered)
    layers = handle.stats()["layers"]
    assert operators.ran["attention"] + operators.ran["short_attention"] == len(layers)
    assert operators.ran["attention"] == operators.ran["attention_backward"]
    assert float(stock.norm()) > 0
    assert distance(got, truth) <= 2 * distance(stock, truth) + torch.finfo(torch.float32).eps
    assert not any(layer["fallbacks"] for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_gradients_only_the_kernel_runs(family):
    """Score distillation itself treats the answer as a constant: nothing may be kept for a backward pass."""
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    with Operators() as operators:
        answer = tiny.run(model, {**inputs, latents(inputs): inputs[latents(inputs)].requires_grad_()})
    assert not answer.requires_grad
    assert operators.ran["attention"] + operators.ran["short_attention"] == len(handle.stats()["layers"])
    assert not operators.ran["attention_backward"]


def test_double_precision_takes_the_differentiable_stock_path_and_says_so():
    model, _ = tiny.wan(layers=1)
    handle = accelerate(model.double())
    tokens = torch.randn(1, 8, 32, dtype=torch.float64, requires_grad=True)
    with Operators() as operators:
        assert torch.autograd.gradcheck(model.blocks[0].attn1, (tokens,), fast_mode=True)
    (layer,) = handle.stats()["layers"]
    assert set(layer["fallbacks"]) == {"dtype float64 has no kernel"}
    assert not operators.ran["attention"]
