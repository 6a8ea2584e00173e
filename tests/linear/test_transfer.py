"""Selective transfer: the mixture, its penalties in closed form, rounding, and what becomes of it in a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from planner_settings import build

from vdit_fast import accelerate, reference
from vdit_fast.config import Config
from vdit_fast.linear import LinearAttention, SelectiveTransfer, save_feature_maps


def made(layers: Any = (0, 1, 2), target: int = 1, **kw: Any) -> SelectiveTransfer:
    transfer = SelectiveTransfer(layers, heads=2, head_dim=16, target=target, **kw)
    with torch.no_grad():
        for maps in (transfer.q_maps, transfer.k_maps):
            for w in maps:
                w.add_(torch.randn_like(w))
    return transfer


def set_ratios(transfer: SelectiveTransfer, *values: float) -> None:
    with torch.no_grad():
        transfer.ratio.copy_(torch.tensor(values))


# ----------------------------------------------------------------------------------------------------- closed forms
def test_penalty() -> None:
    transfer = made()
    set_ratios(transfer, 0.0, 0.5, 1.0)
    for alpha in (20.0, 7.5, 2.0):
        assert transfer.penalty(alpha).item() == 1.0  # 0 at both ends, 1 in the middle
    set_ratios(transfer, 0.25, 0.75, 1.0)
    for alpha in (20.0, 2.0):
        torch.testing.assert_close(transfer.penalty(alpha), torch.tensor(2 * (1 - 0.5**alpha)))
    transfer.penalty(2.0).backward()  # d/dr (1 - (2r - 1)^2) = -4 (2r - 1)
    torch.testing.assert_close(transfer.ratio.grad, torch.tensor([2.0, -2.0, -4.0]))


def test_count_penalty_counts_linear_layers_after_rounding() -> None:
    transfer = made(target=2)
    for ratios, linear in (((0.1, 0.9, 0.8), 1), ((0.1, 0.4, 0.8), 2), ((0.1, 0.4, 0.3), 3), ((0.6, 0.9, 1.0), 0)):
        set_ratios(transfer, *ratios)
        assert transfer.count_penalty().item() == (linear - 2) ** 2
    set_ratios(transfer, 0.6, 0.9, 1.0)
    transfer.count_penalty().backward()  # too few: every r is pushed down by 2 (2 - 0)
    torch.testing.assert_close(transfer.ratio.grad, torch.full((3,), 4.0))


def test_clamping_and_choice() -> None:
    transfer = made(layers=(1, 4, 7), target=2)
    set_ratios(transfer, -0.2, 1.3, 0.4)
    transfer.clamp_()
    assert transfer.ratio.tolist() == pytest.approx([0.0, 1.0, 0.4])
    assert transfer.chosen() == (1, 7) == transfer.round_()
    assert transfer.ratio.tolist() == [0.0, 1.0, 0.0] and transfer.penalty(2.0).item() == 0
    set_ratios(transfer, 0.7, 0.9, 0.8)  # none rounds to 0: the target holds all the same
    assert transfer.chosen() == (1, 7)
    assert transfer.round_([4]) == (4,) and transfer.ratio.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"\[2\] are no candidates"):
        transfer.round_([2])


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"layers": []}, "candidates"),
        ({"layers": [1, 1]}, "none twice"),
        ({"layers": [-1]}, "from 0 on"),
        ({"target": 4}, "target is 4"),
        ({"target": -1}, "target is -1"),
        ({"ratio": 1.5}, "ratio is 1.5"),
    ],
)
def test_bad_settings(kw: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        made(**kw)


def test_mixture_by_hand() -> None:
    transfer = SelectiveTransfer([3], heads=4, kv_heads=2, head_dim=8, target=1, ratio=0.3)
    q, k, v = torch.randn(2, 11, 4, 8), torch.randn(2, 13, 2, 8), torch.randn(2, 13, 2, 8)
    kv_len, soft = torch.tensor([13, 6]), torch.randn(2, 11, 4, 8)
    linear = reference.linear_attention(
        *(x.double() for x in (q, k, v)), q_weight=torch.eye(8).double(), k_weight=torch.eye(8).double(), kv_len=kv_len
    )
    got = transfer.attend(0, lambda: soft, q, k, v, kv_len)
    torch.testing.assert_close(got.double(), 0.3 * soft.double() + 0.7 * linear, atol=2e-6, rtol=1e-5)
    got.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in transfer.parameters())


# --------------------------------------------------------------------------------------------------------- in a model
@pytest.mark.parametrize("family", ["wan_t2v", "hunyuan_video", "cogvideox_5b"])
@pytest.mark.parametrize("rounded", [False, True])
def test_all_softmax_is_the_model_bit_for_bit(family: str, rounded: bool) -> None:
    model, inputs = tiny.build(family)
    handle = accelerate(model)
    want = tiny.run(model, inputs)
    transfer = made(range(len(handle.stats()["layers"])), ratio=1.0)
    transfer.attach(handle)
    if rounded:
        transfer.round_([])
    assert torch.equal(tiny.run(model, inputs), want)
    set_ratios(transfer, *[0.5] * len(transfer.layers))
    transfer.blend_(0.5)
    assert tiny.relative(tiny.run(model, inputs), want) > 1e-3
    transfer.detach()
    assert torch.equal(tiny.run(model, inputs), want)


def test_training_reaches_ratios_maps_and_weights() -> None:
    model, inputs = build("hunyuan_video", (3, 4, 4))
    handle = accelerate(model.requires_grad_())
    transfer = made([0, 1])
    transfer.attach(handle)
    model(**inputs)[0].square().mean().backward()
    for parameter in (*transfer.parameters(), model.transformer_blocks[0].attn.to_q.weight):
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and float(parameter.grad.norm()) > 0


def test_ratio_follows_its_difference_quotient() -> None:
    model, inputs = tiny.wan(layers=2)
    transfer = made([1], ratio=0.6)
    transfer.attach(accelerate(model))

    def loss() -> torch.Tensor:
        return model(**inputs)[0].square().mean()

    loss().backward()
    slope, values = float(transfer.ratio.grad), []
    for r in (0.59, 0.61):
        set_ratios(transfer, r)
        values.append(loss().item())
    assert slope == pytest.approx((values[1] - values[0]) / 0.02, rel=2e-2)


def test_the_rounded_mixture_is_the_converted_model(tmp_path: Any) -> None:
    model, inputs = tiny.wan(layers=4)
    handle = accelerate(model)
    names = {row["layer"]: row["name"] for row in handle.stats()["layers"]}
    transfer = made([1, 2, 3], target=2)
    set_ratios(transfer, 0.2, 0.9, 0.1)
    transfer.attach(handle)
    assert transfer.round_() == (1, 3)
    want = tiny.run(model, inputs)
    maps = transfer.feature_maps(names)
    path = save_feature_maps(tmp_path / "m", {"transformer": maps}, family="wan", num_layers=4)
    handle.remove()
    handle = accelerate(model, Config(linear=LinearAttention(str(path))))
    assert torch.equal(tiny.run(model, inputs), want)
    assert handle.stats()["linear"] == {"transformer": [1, 3]}


def test_where_it_cannot_be_attached(maps_for: Any) -> None:
    model, inputs = tiny.wan(layers=2)
    linear = maps_for(model, [1], inputs=inputs)
    handle = accelerate(model, Config(linear=linear))
    with pytest.raises(ValueError, match=r"\[1\] have another stand-in"):
        made([0, 1]).attach(handle)
    made([0]).attach(handle)
    handle.remove()
    with pytest.raises(ValueError, match=r"\[5\] do not exist, the transformer has 2"):
        made([1, 5]).attach(accelerate(model))
    pair = SimpleNamespace(transformer=tiny.wan()[0], transformer_2=tiny.wan()[0])
    with pytest.raises(ValueError, match="2 transformers"):
        made([1]).attach(accelerate(pair))
