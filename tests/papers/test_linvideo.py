"""LinVideo: A Post-Training Framework towards O(n) Attention in Efficient Video Generation (arXiv 2510.08318).

Chosen layers use normalised, non-causal linear attention with φ(x) = softmax(x W) ⊕ softmax(−x W); the others stay
softmax. The choice is learned: o = r o_softmax + (1 − r) o_linear with one r per layer that ends as 0 or 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from paper_checks import Operators, distance
from torch import Tensor

from vdit_fast import accelerate, reference
from vdit_fast.config import Config
from vdit_fast.linear import FeatureMap, LinearAttention, SelectiveTransfer, save_feature_maps
from vdit_fast.ops.linear_attention import (
    linear_attention,
    linear_attention_readout,
    linear_attention_state,
)

WAN_1_3B = (*range(1, 8), *range(9, 13), 14, 15, 22, 24, 29)
"""The paper's layers of Wan 2.1 1.3B, from 0 on: 16 of 30."""
H, D = 3, 16
EPS = torch.finfo(torch.float32).eps


def phi(x: Tensor, w: Tensor) -> Tensor:
    """fp64 features [B, N, H, 2 D]."""
    y = torch.einsum("bnhd,hde->bnhe", x.double(), w.double())
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = torch.randn(3, 2, 137, H, D).unbind(0)
    q_weight, k_weight = torch.randn(2, H, D, D).unbind(0)
    return q, k, v, {"q_weight": q_weight, "k_weight": k_weight}


def test_l1a_is_the_explicit_matrix(call: Any) -> None:
    q, k, v, maps = call
    weights = torch.einsum("bihf,bjhf->bhij", phi(q, maps["q_weight"]), phi(k, maps["k_weight"]))
    want = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v.double())
    allowed = 2 * distance(reference.linear_attention(q, k, v, **maps), want) + EPS
    assert distance(linear_attention(q, k, v, **maps), want) <= allowed
    order = torch.randperm(k.shape[1])  # non-causal: the order of keys says nothing
    assert distance(linear_attention(q, k[:, order], v[:, order], **maps), want) <= allowed


def test_l1b_features_are_two_distributions(call: Any) -> None:
    q, k, v, maps = call
    features = reference.linear_attention_state(k[:, :1], torch.ones_like(v[:, :1]), weight=maps["k_weight"])[..., -1]
    sums = features.double().unflatten(-1, (2, D)).sum(-1)
    assert (sums - 1).abs().max() <= D * EPS / 2  # every feature of fp32 is rounded
    z = linear_attention_state(k, v, weight=maps["k_weight"])[..., -1].double()
    denominators = torch.einsum("bihf,bhf->bih", phi(q, maps["q_weight"]), z)
    largest = z.unflatten(-1, (2, D)).sum(-1).max()  # of N rows of sums 1
    assert (largest - k.shape[1]).abs() <= 2 * EPS * k.shape[1] * k.shape[1] ** 0.5
    assert denominators.min() > 0 and denominators.max() <= 2 * largest


def test_l1c_a_constant_value_comes_back(call: Any) -> None:
    q, k, _, maps = call
    row = torch.randn(1, 1, H, D)
    out = linear_attention(q, k, row.expand_as(k), **maps)
    twin = reference.linear_attention(q, k, row.expand_as(k), **maps)
    assert distance(out, row.expand_as(out)) <= 2 * distance(twin, row.expand_as(out)) + EPS


@pytest.mark.parametrize("shards", [[137], [100, 37], [1, 64, 72], [17] * 8 + [1]])
def test_l1d_states_of_shards_add_up(call: Any, shards: list[int]) -> None:
    q, k, v, maps = call
    parts = [
        linear_attention_state(a, b, weight=maps["k_weight"])
        for a, b in zip(k.split(shards, 1), v.split(shards, 1), strict=True)
    ]
    out = linear_attention_readout(q, torch.stack(parts).sum(0), weight=maps["q_weight"])
    want = reference.linear_attention(*(x.double() for x in (q, k, v)), **{n: x.double() for n, x in maps.items()})
    assert distance(out, want) <= 2 * distance(reference.linear_attention(q, k, v, **maps), want) + EPS


def test_long_sequences_in_bf16_on_sampled_rows() -> None:
    """The paper's 75,600 tokens, here 12,000: a sum over all keys in fp32, whatever the inputs are."""
    tokens = 12_000
    q, k, v = torch.randn(3, 1, tokens, 2, 64).bfloat16().unbind(0)
    q_weight, k_weight = (torch.randn(2, 2, 64, 64) / 8).unbind(0)
    out = linear_attention(q, k, v, q_weight=q_weight, k_weight=k_weight)
    rows = torch.randint(tokens, (50,))
    weights = torch.einsum("bihf,bjhf->bhij", phi(q[:, rows], q_weight), phi(k, k_weight))
    want = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v.double())
    assert out.dtype == torch.bfloat16
    maps = {"q_weight": q_weight, "k_weight": k_weight}
    twin = reference.linear_attention(q[:, rows], k, v, **maps)  # fp32, and the result rounded
    assert distance(out[:, rows], want) <= 2 * distance(twin, want)


def test_16_of_30_layers_beside_softmax(tmp_path: Path) -> None:
    model, inputs = tiny.wan(layers=30)
    stock = tiny.run(model, inputs)
    maps = {i: FeatureMap(f"blocks.{i}.attn1", *torch.randn(2, 2, 16, 16) / 4) for i in WAN_1_3B}
    path = save_feature_maps(tmp_path / "m.safetensors", {"transformer": maps}, family="wan", num_layers=30)
    handle = accelerate(model, Config(linear=LinearAttention(str(path))))
    with Operators() as operators:
        got = tiny.run(model, inputs)
    assert distance(got, stock) > 1e-3
    stats = handle.stats()
    assert stats["linear"] == {"transformer": list(WAN_1_3B)} and len(WAN_1_3B) == 16
    assert operators.ran["attention"] == 30 - 16 and all(row["calls"] == 1 for row in stats["layers"])
    assert "linear attention: 16 of 30 layers" in handle.report()
    assert not any(row["dense"] or row["fallbacks"] for row in stats["layers"])


def test_r_of_one_is_the_softmax_model() -> None:
    model, inputs = tiny.wan(layers=4)
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    transfer = SelectiveTransfer(range(4), heads=2, head_dim=16, target=2, ratio=1.0)
    transfer.attach(handle)
    assert torch.equal(tiny.run(model, inputs), want)
    assert transfer.penalty(2.0).item() == 0 and transfer.count_penalty().item() == 4  # two linear layers are missing


def test_selection_keeps_the_layers_that_matter_softmax() -> None:
    """A layer whose linear attention costs nothing is found: its neighbour's output is what the loss is about."""
    model, inputs = tiny.wan(layers=3)
    model.blocks[1].attn1.to_out[0].weight.data.zero_()  # this layer's attention has no say
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    transfer = SelectiveTransfer(range(3), heads=2, head_dim=16, target=1)
    transfer.attach(handle)
    optimiser, steps = torch.optim.Adam([transfer.ratio], 0.05), 40
    for step in range(steps):
        loss = (model(**inputs)[0] - want).square().mean() / want.square().mean()
        alpha = 20 + (2 - 20) * step / steps
        (100 * loss + 0.01 * transfer.penalty(alpha) + 0.01 * transfer.count_penalty()).backward()
        optimiser.step()
        transfer.clamp_()
        optimiser.zero_grad()
    assert transfer.round_() == (1,)
    assert tiny.relative(tiny.run(model, inputs), want) < 1e-6
